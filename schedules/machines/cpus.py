"""What a kernel has to know of the CPU it is generated for: its vectors, and what its cores do in a cycle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tvm.target import Target, codegen


@dataclass(frozen=True)
class Core:
    """A micro-architecture: how many multiply-adds and loads of vectors start in a cycle, and how long one takes.

    `shared` says that both need the same few slots, as small cores have them; `multiplies` is then their number.
    """

    name: str
    multiplies: int = 2
    loads: int = 2
    latency: int = 4
    shared: bool = False

    def cycles(self, multiplies: float, loads: float) -> float:
        """Of a step of many independent sums: bound by slots, by loads, or by the latency of one sum."""
        if self.shared:
            return max((multiplies + loads) / self.multiplies, self.latency)
        return max(multiplies / self.multiplies, loads / self.loads, self.latency) + 0.02 * loads


BIG = Core("any large core")
SMALL = Core("any small core", shared=True)
# By LLVM's name, where a core differs from what is assumed of its architecture.
CORES = {
    # Four pipes for vectors, three for loads (Arm, "Cortex-X4 Core Software Optimization Guide").
    "cortex-x4": Core("Cortex-X4", multiplies=4, loads=3),
}


@dataclass(frozen=True)
class Isa:
    """A vector unit, in lanes of the type that it computes in, and in architectural registers.

    `stored` is the type of activations and weights between kernels, which some kernels widen to compute. `by_lane`
    says that a multiply-add can take one lane of a vector for a factor.
    """

    name: str
    lanes: int
    registers: int
    dtype: str = "float32"
    stored: str = "float32"
    by_lane: bool = False
    core: Core = field(default=BIG, compare=False)  # moves the best tiling by little: records are served across cores

    def storing(self, dtype: str) -> Isa:
        """The unit for a model of the type: a register holds twice as many numbers of half the size."""
        if dtype == self.stored:
            return self
        return replace(self, lanes=2 * self.lanes, dtype=dtype, stored=dtype)

    def wide(self) -> Isa:
        """The unit for kernels that need float32's accuracy throughout, whatever is stored."""
        return self if self.dtype == "float32" else replace(self, lanes=self.lanes // 2, dtype="float32")


THREADS = 4  # that work is cut for where the target does not say: most boards divide by it

AVX512 = Isa("avx512", lanes=16, registers=32)
AVX512VL = Isa("avx512vl", lanes=8, registers=32)
AVX2 = Isa("avx2", lanes=8, registers=16)
# SVE would not multiply more: what Neoverse V1 has is four pipes of 128 bits for NEON, of which SVE makes two of 256
# (Arm, "Neoverse V1 Software Optimization Guide": four FMLA a cycle, or two of SVE's).
NEON = Isa("neon", lanes=4, registers=32, by_lane=True, core=SMALL)
SSE = Isa("sse", lanes=4, registers=16)


def isa_of(target: Mapping[str, Any]) -> Isa:
    """The vector unit of a TVM target (of kind llvm), as LLVM will use it."""
    isa = _vectors_of(target)
    return replace(isa, core=CORES.get(str(target.get("mcpu", "")), isa.core))


def _vectors_of(target: Mapping[str, Any]) -> Isa:
    triple = str(target.get("mtriple", ""))
    if triple.startswith(("aarch64", "arm64")):
        return NEON
    features = {str(feature) for feature in codegen.llvm_get_cpu_features(Target(dict(target)))}
    if "avx512f" in features:
        # Told to prefer 256 bits, LLVM would split wider vectors in two.
        return AVX512VL if "prefer-256-bit" in features else AVX512
    if {"avx2", "fma"} <= features:
        return AVX2
    return SSE


def threads_of(target: Mapping[str, Any]) -> int:
    """How many threads the work of a TVM target is cut for."""
    return int(target.get("num-cores", THREADS))
