"""What a target is."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from saevit_tvm.support.errors import UsageError


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

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of it."""
        found = {"name": self.name, "tvm": self.tvm, "arch": self.arch, "features": list(self.features)}
        return found | ({"emulator": self.emulator} if self.emulator else {})

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
    def threads(self) -> int | None:
        """How many threads of a CPU the work is cut for, where a number is given."""
        cores = self.tvm.get("num-cores")
        return None if cores is None else int(cores)

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

    def beside_this_cpu(self) -> Target:
        """The same device in a machine like this one, if it is none that a CPU is by itself."""
        machine = platform.machine()
        host = {"kind": "llvm", "mtriple": f"{machine}-linux-gnu"}
        return replace(self, tvm=self.tvm | {"host": host}, arch=machine, features=(), linkers=("cc",), link_flags=())

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
