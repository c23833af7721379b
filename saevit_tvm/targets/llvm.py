"""What LLVM makes of a target description: whether it knows it, and which CPU features its code will use."""

from __future__ import annotations

from typing import Any

from saevit_tvm.support.errors import UsageError, unknown

# The x86 features that matter to generated code, and the name that /proc/cpuinfo has for each.
_OWN_NAMES = {
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avxvnni": "avx_vnni",
    "avxifma": "avx_ifma",
}
_SAME_NAMES = [
    *("ssse3", "sse4a", "popcnt", "bmi2", "tbm", "movbe"),
    *("avx", "avx2", "fma", "fma4", "xop", "f16c", "gfni", "vaes", "vpclmulqdq"),
]
_AVX512 = ["f", "bw", "cd", "dq", "vl", "ifma", "vbmi"]
_AVX512_LATER = ["vbmi2", "vnni", "bf16", "fp16", "bitalg", "vpopcntdq"]
_AMX = ["tile", "int8", "bf16", "fp16"]
# And those of aarch64; cryptography, which kernels have no use for, is not among them (a Raspberry Pi 4 lacks it).
_AARCH64_NAMES = {
    "fp-armv8": "fp",
    "neon": "asimd",
    "lse": "atomics",
    "rdm": "asimdrdm",
    "fullfp16": "asimdhp",
    "dotprod": "asimddp",
    "fp16fml": "asimdfhm",
    "complxnum": "fcma",
    "jsconv": "jscvt",
    "rcpc": "lrcpc",
    **{name: name for name in ("i8mm", "bf16", "sve", "sve2")},
}
KERNEL_NAMES = (
    _OWN_NAMES
    | {name: name for name in _SAME_NAMES}
    | {f"avx512{part}": f"avx512{part}" for part in _AVX512}
    | {f"avx512{part}": f"avx512_{part}" for part in _AVX512_LATER}
    | {f"amx-{part}": f"amx_{part}" for part in _AMX}
    | _AARCH64_NAMES
)


def check(description: dict[str, Any]) -> None:
    """Raise UsageError for a description that TVM refuses, or whose CPU LLVM would silently replace."""
    from tvm.target import Target, codegen

    try:
        target = Target({key: value for key, value in description.items() if key != "mcpu"})
        known = sorted(map(str, codegen.llvm_get_cpu_archlist(target)))
        cpu = description.get("mcpu", known[0])
        if isinstance(cpu, str) and cpu not in known:
            raise unknown("CPU", cpu, known)
        Target(description)
    except (ValueError, TypeError) as error:
        reason = str(error).split("Target creation")[0].split(". Known options")[0].strip(" .")
        raise UsageError(f"TVM does not take this target: {reason}.") from error


def code_features(description: dict[str, Any]) -> tuple[str, ...]:
    """The CPU features that code for this target may use, as /proc/cpuinfo spells them."""
    return tuple(sorted(KERNEL_NAMES[name] for name in _assumed(description)))


def hidden_features(description: dict[str, Any], here: set[str]) -> list[str]:
    """What LLVM takes for granted on this CPU and the kernel does not report, in LLVM's names."""
    hidden = sorted(name for name in _assumed(description) if KERNEL_NAMES[name] not in here)
    if "avx512f" in hidden:  # the rest of AVX-512 goes with its foundation
        hidden = [name for name in hidden if name == "avx512f" or not name.startswith("avx512")]
    return hidden


def splits_vectors(description: dict[str, Any]) -> bool:
    """Whether LLVM makes two of each vector of 512 bits for this CPU."""
    from tvm.target import Target, codegen

    return {"avx512f", "prefer-256-bit"} <= set(map(str, codegen.llvm_get_cpu_features(Target(description))))


def _assumed(description: dict[str, Any]) -> set[str]:
    from tvm.target import Target, codegen

    return set(map(str, codegen.llvm_get_cpu_features(Target(description)))) & set(KERNEL_NAMES)
