"""What a kernel has to know of the CPU it is generated for: how wide its vectors are and how many it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.target import Target, codegen


@dataclass(frozen=True)
class Isa:
    """A vector unit, in float32 lanes and architectural registers."""

    name: str
    lanes: int
    registers: int


AVX512 = Isa("avx512", lanes=16, registers=32)
AVX512VL = Isa("avx512vl", lanes=8, registers=32)
AVX2 = Isa("avx2", lanes=8, registers=16)
NEON = Isa("neon", lanes=4, registers=32)
SSE = Isa("sse", lanes=4, registers=16)


def isa_of(target: Mapping[str, Any]) -> Isa:
    """The vector unit of a TVM target (of kind llvm), as LLVM will use it."""
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
