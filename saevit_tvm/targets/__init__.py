"""Targets are data: what to tell TVM, what the CPU must have, who links, and how the result is proven.

One file a family of boards; adding a board is adding an entry there.
"""

from __future__ import annotations

import json
import platform
import re
from typing import Any

from saevit_tvm.errors import UsageError, unknown
from saevit_tvm.targets import arm, llvm, riscv
from saevit_tvm.targets.base import Target, dtypes_with, runs_here
from saevit_tvm.targets.cuda import CUDA_NAMES, cuda_targets
from saevit_tvm.targets.opencl import OPENCL_NAMES, opencl_targets
from saevit_tvm.targets.sources import SOURCE_TARGETS
from saevit_tvm.targets.x86 import X86_TARGETS, native

__all__ = ["Target", "all_targets", "get", "how_to_run", "linkers_for", "names", "native", "runs_here", "why_not"]

_NAMED = (*X86_TARGETS, *arm.ARM_TARGETS, *riscv.RISCV_TARGETS, *SOURCE_TARGETS)

# Architectures other than this machine's that a target of the user's own may have: who links, which CPU stands in.
_FOREIGN = {"aarch64": (arm.LINKERS, "max"), "riscv64": (riscv.LINKERS, "rv64")}


def all_targets() -> list[Target]:
    """Every named target, the machine at hand first."""
    return [native(), *_NAMED, *opencl_targets(), *cuda_targets()]


def names() -> list[str]:
    return ["native", *(target.name for target in _NAMED), *OPENCL_NAMES, *CUDA_NAMES]


def get(name_or_json: str, threads: int | None = None) -> Target:
    """A target by name, or from TVM's own target JSON, for its own number of threads or for another."""
    target = _find(name_or_json)
    return target if threads is None else target.cut_for(threads)


def _find(name_or_json: str) -> Target:
    if name_or_json.lstrip().startswith("{"):
        return _from_json(name_or_json)
    if name_or_json == "native":
        return native()
    if name_or_json in OPENCL_NAMES:
        return next(target for target in opencl_targets() if target.name == name_or_json)
    if name_or_json in CUDA_NAMES:
        return next(target for target in cuda_targets() if target.name == name_or_json)
    for target in _NAMED:
        if target.name == name_or_json:
            return target
    raise unknown("target", name_or_json, names())


def _from_json(text: str) -> Target:
    try:
        description = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"the target is not valid JSON ({error.msg} at character {error.pos}): give TVM's target JSON, "
            'such as {"kind": "llvm", "mcpu": "znver4"}.'
        ) from error
    return _custom(description)


def _custom(description: dict[str, Any]) -> Target:
    """A target of the user's own. Only CPUs: anything else needs schedules that are not there."""
    if description.get("kind") != "llvm":
        raise UsageError(
            f"a target of kind '{description.get('kind')}' cannot be built: "
            'give one of kind "llvm", such as {"kind": "llvm", "mcpu": "znver4"}.'
        )
    here, triple = platform.machine(), str(description.get("mtriple", ""))
    arch, system = triple.split("-")[0] or here, triple.partition("-")[2]
    if arch not in {here, *_FOREIGN}:
        raise UsageError(
            f"the target's triple '{triple}' is for {arch}, and only {', '.join(sorted({here, *_FOREIGN}))} are "
            "supported: leave 'mtriple' out for this machine, or give one such as 'aarch64-linux-gnu'."
        )
    if triple and not re.fullmatch(r"((unknown|pc)-)?linux(-gnu)?", system):
        raise UsageError(f"the target's triple '{triple}' is not for Linux: give one such as '{arch}-linux-gnu'.")
    llvm.check(description)
    emulator = None if arch == here else _FOREIGN[arch][1]
    if emulator == "max" and description.get("mcpu") in {target.emulator for target in arm.ARM_TARGETS}:
        emulator = description["mcpu"]
    features = llvm.code_features(description)
    return Target(
        name="custom",
        summary="given as TVM target JSON",
        tvm=description,
        arch=arch,
        features=features,
        dtypes=dtypes_with(features),
        emulator=emulator,
        linkers=linkers_for(arch),
    )


def linkers_for(arch: str) -> tuple[str, ...]:
    """The compilers that can make Linux programs of an architecture, the best first."""
    return ("cc",) if arch == platform.machine() else _FOREIGN[arch][0]


def how_to_run(target: Target) -> str | None:
    """Where code for the target can be run from here: "host", "qemu", or nowhere."""
    return _way(target)[0]


def why_not(target: Target) -> str:
    """Why code for the target cannot be run from here."""
    return _way(target)[1]


def _way(target: Target) -> tuple[str | None, str]:
    if target.output == "objects":
        what = "object files" if target.kind == "llvm" else "sources and object files"
        return None, f"gives {what}, to be linked and proven on such a machine"
    runs, reason = runs_here(target)
    if runs:
        return "host", ""
    if target.emulator is None or target.arch == platform.machine():
        return None, reason
    from saevit_tvm.runtime import emulator

    lacking = emulator.missing(target.arch)
    return (None, f"{reason}; {lacking}") if lacking else ("qemu", "")
