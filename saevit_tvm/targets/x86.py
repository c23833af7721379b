"""x86-64: the CPU at hand, and the two portable levels that servers and desktops agree on."""

from __future__ import annotations

import os
import platform

from saevit_tvm.targets.base import Target, cpu_features

V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

X86_TARGETS = (
    Target(
        name="x86-64-v3",
        summary="any x86-64 with AVX2 and FMA (Haswell, Zen and later)",
        tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
        arch="x86_64",
        features=V3,
    ),
    Target(
        name="x86-64-v4",
        summary="any x86-64 with AVX-512 (Skylake-SP, Zen 4 and later)",
        tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
        arch="x86_64",
        features=V4,
    ),
)


def native() -> Target:
    """This machine's CPU as LLVM names it, with the cores this process may use."""
    from tvm.target import codegen

    cores = len(os.sched_getaffinity(0))
    cpu = codegen.llvm_get_system_cpu()
    level = tuple(feature for feature in V4 if feature in cpu_features())
    return Target(
        name="native",
        summary=f"this machine: {cpu}, {cores} cores",
        tvm={"kind": "llvm", "mtriple": f"{platform.machine()}-linux-gnu", "mcpu": cpu, "num-cores": cores},
        arch=platform.machine(),
        features=level,
    )
