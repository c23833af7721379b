"""x86-64: the CPU at hand, and the two portable levels that servers and desktops agree on."""

from __future__ import annotations

import os
import platform
from typing import Any

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
        # LLVM splits 512-bit vectors in two at this level unless it is told not to.
        tvm={
            "kind": "llvm",
            "mtriple": "x86_64-linux-gnu",
            "mcpu": "x86-64-v4",
            "mattr": ["-prefer-256-bit"],
        },
        arch="x86_64",
        features=V4,
    ),
)


def native() -> Target:
    """This machine's CPU as LLVM names it, with the cores this process may use.

    A virtual machine often hides part of its CPU (AVX-512, say). LLVM goes by the family and would use it all
    the same, so what the kernel does not report is switched off.
    """
    from tvm.target import codegen

    here = cpu_features()
    cores = len(os.sched_getaffinity(0))
    cpu = codegen.llvm_get_system_cpu()
    description: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": f"{platform.machine()}-linux-gnu",
        "mcpu": cpu,
        "num-cores": cores,
    }
    hidden = _hidden_vector_features(description, here)
    if hidden:
        description["mattr"] = [f"-{feature}" for feature in hidden]
    without = f", without {', '.join(hidden)}" if hidden else ""
    return Target(
        name="native",
        summary=f"this machine: {cpu}{without}, {cores} cores",
        tvm=description,
        arch=platform.machine(),
        features=tuple(feature for feature in V4 if feature in here),
    )


def _hidden_vector_features(description: dict[str, Any], here: set[str]) -> list[str]:
    """Vector extensions that LLVM takes for granted on this CPU and the kernel does not report."""
    from tvm.target import Target as TVMTarget
    from tvm.target import codegen

    reported = {feature.replace("_", "") for feature in here}
    assumed = {str(feature) for feature in codegen.llvm_get_cpu_features(TVMTarget(description))}
    vector = ("avx", "amx", "fma", "f16c", "gfni", "vaes", "vpclmul")
    hidden = sorted(f for f in assumed if f.startswith(vector) and f.replace("-", "") not in reported)
    if "avx512f" in hidden:  # the rest of AVX-512 goes with its foundation
        hidden = [feature for feature in hidden if feature == "avx512f" or not feature.startswith("avx512")]
    return hidden
