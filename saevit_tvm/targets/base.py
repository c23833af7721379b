"""What a target is, and whether the machine at hand can run what is built for it."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saevit_tvm.errors import UsageError
from saevit_tvm.runtime import cuda, opencl


@dataclass(frozen=True)
class Target:
    """One thing to build for. `tvm` is TVM's target JSON; the rest is what TVM does not know.

    `features` are what the code needs of a CPU, in the names of /proc/cpuinfo. `proof` is what a run on the real
    thing is called, `emulator` the CPU model of qemu that stands in for it. `linkers` are C compilers for it, the
    best first, and `link_flags` what they must be told. `output` is what they make. `dtypes` are what models can be
    built in.
    """

    name: str
    summary: str
    tvm: dict[str, Any]
    arch: str
    features: tuple[str, ...] = ()
    kind: str = "llvm"
    proof: str = "host"
    emulator: str | None = None
    linkers: tuple[str, ...] = ("cc",)
    link_flags: tuple[str, ...] = ()
    output: str = "library"
    dtypes: tuple[str, ...] = ("float32",)

    def computing_in(self, dtype: str) -> Target:
        """The target as it is when it computes in a type; UsageError where it cannot."""
        if dtype not in self.dtypes:
            raise UsageError(
                f"target '{self.name}' cannot compute in {dtype}: give --dtype {' or '.join(self.dtypes)}, "
                "or a target that can ('saevit-tvm targets' says what each computes in)."
            )
        return self

    @property
    def triple(self) -> str:
        """What the code of the CPU is for, in LLVM's words; beside a device it is the host's."""
        return str(self.tvm.get("host", self.tvm).get("mtriple", f"{self.arch}-linux-gnu"))

    @property
    def android(self) -> bool:
        """Whether programs find Android's C library there, which only Google's NDK can compile for."""
        return "android" in self.triple

    @property
    def fingerprint(self) -> str:
        """The folder of this target's tuning records: what changes the best schedule, nothing else."""
        cpu = self.tvm.get("mcpu", "generic")
        cores = self.tvm.get("num-cores", 0)
        extra = "".join(self.tvm.get("mattr", []))
        parts = [self.arch, cpu + extra, f"{cores}c" if cores else "anyc"]
        return re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join(parts))

    def cut_for(self, threads: int) -> Target:
        """The same target, its work cut for so many threads, whatever the cores it has."""
        if self.kind != "llvm":
            raise UsageError(
                f"--threads {threads} means nothing for target '{self.name}': its kernels are not cut for threads "
                "of a CPU; leave it out."
            )
        return replace(self, tvm=self.tvm | {"num-cores": threads})


def dtypes_with(features: Iterable[str]) -> tuple[str, ...]:
    """What a CPU computes in. x86 before AVX512-FP16 can only convert float16, and does so in every inner loop."""
    return ("float32", "float16") if "asimdhp" in features else ("float32",)


def runs_here(target: Target) -> tuple[bool, str]:
    """Whether this machine can run the target's code, and if not, why not."""
    there, reason = _runs_here(target)
    if target.kind == "cuda" and not there:
        reason += "; its code is read back, and where it can, this CPU runs its kernels"
    return there, reason


def _runs_here(target: Target) -> tuple[bool, str]:
    if target.arch != platform.machine():
        return False, f"needs {target.arch}, this machine is {platform.machine()}"
    missing = sorted(set(target.features) - cpu_features())
    if missing:
        return False, f"needs CPU features this machine lacks: {', '.join(missing)}"
    if target.kind == "opencl":
        return opencl.available()
    if target.kind == "cuda":
        there, reason = cuda.available()
        return there, reason if there else f"needs an NVIDIA GPU, and {reason}"
    return True, "runs on this machine"


def cpu_features() -> set[str]:
    """The feature names the kernel reports for this CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(match.group(1).split()) if match else set()
