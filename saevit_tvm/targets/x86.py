"""x86-64: the CPU at hand, and the two portable levels that servers and desktops agree on."""

from __future__ import annotations

import platform
from typing import Any

from saevit_tvm.support import cpu
from saevit_tvm.targets.base import Target, dtypes_with
from saevit_tvm.targets.llvm import code_features, hidden_features, splits_vectors

V2 = ("pni", "popcnt", "sse4_1", "sse4_2", "ssse3")
V3 = (*V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
V4 = (*V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")

# Of all Intel's cores LLVM assumes that they lower their clock for 512 bits, and splits such vectors in two. Ours do
# nothing but multiply and add, and with two units of 512 bits that is twice the speed; with one it is the same.
WHOLE_VECTORS = "-prefer-256-bit"

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
        tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4", "mattr": [WHOLE_VECTORS]},
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

    cores, name = cpu.cores(), codegen.llvm_get_system_cpu()
    description: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": f"{platform.machine()}-linux-gnu",
        "mcpu": name,
        "num-cores": cores,
    }
    hidden = hidden_features(description, cpu.features())
    changed = [f"-{feature}" for feature in hidden]
    changed += [WHOLE_VECTORS] if splits_vectors(description) and "avx512f" not in hidden else []
    if changed:
        description["mattr"] = changed
    without = f", without {', '.join(hidden)}" if hidden else ""
    features = code_features(description)
    return Target(
        name="native",
        summary=f"this machine: {name}{without}, {cores} cores",
        tvm=description,
        arch=platform.machine(),
        features=features,
        dtypes=dtypes_with(features),
    )
