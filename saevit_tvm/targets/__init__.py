"""Targets are data: what to tell TVM, what the CPU must have, who links, and how the result is proven.

One file a family of boards; adding a board is adding an entry there.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from typing import Any

from saevit_tvm.support.errors import UsageError, unknown
from saevit_tvm.support.toolchain import linkers_for
from saevit_tvm.targets import arm, llvm, riscv
from saevit_tvm.targets.base import Target, dtypes_with
from saevit_tvm.targets.cuda import CUDA_NAMES, cuda_targets
from saevit_tvm.targets.opencl import OPENCL_NAMES, opencl_targets
from saevit_tvm.targets.source_only import SOURCE_TARGETS
from saevit_tvm.targets.x86 import X86_TARGETS, native

__all__ = ["Target", "all_targets", "described", "get", "names", "native"]

_NAMED = (*X86_TARGETS, *arm.ARM_TARGETS, *riscv.RISCV_TARGETS, *SOURCE_TARGETS)

# Architectures other than this machine's that a target of the user's own may have, and which CPU stands in for it.
_FOREIGN = {"aarch64": "max", "riscv64": "rv64"}


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


def described(entry: dict[str, Any]) -> Target:
    """The target of an artifact, by its manifest: a machine of another kind knows it under no name."""
    name, tvm, arch, features = entry["name"], entry["tvm"], entry["arch"], tuple(entry["features"])
    named = get(name) if name in names() else None
    if named is not None and named.tvm == tvm:
        return named
    if "host" in tvm:  # a device beside a CPU
        return Target(name, "", tvm, arch, features, tvm["kind"], linkers=linkers_for(arch))
    return dataclasses.replace(get(json.dumps(tvm)), name=name, features=features)


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
    emulator = None if arch == here else _FOREIGN[arch]
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
