"""Targets are data: what to tell TVM, what the CPU must have, who links, and how the result is proven.

One file a family of boards; adding a board is adding an entry there.
"""

from __future__ import annotations

import json
import platform
from typing import Any

from saevit_tvm.errors import UsageError, unknown
from saevit_tvm.targets import llvm
from saevit_tvm.targets.base import Target, runs_here
from saevit_tvm.targets.x86 import X86_TARGETS, native

__all__ = ["Target", "all_targets", "get", "names", "native", "runs_here"]


def all_targets() -> list[Target]:
    """Every named target, the machine at hand first."""
    return [native(), *X86_TARGETS]


def names() -> list[str]:
    return ["native", *(target.name for target in X86_TARGETS)]


def get(name_or_json: str) -> Target:
    """A target by name, or from TVM's own target JSON."""
    if name_or_json.lstrip().startswith("{"):
        return _from_json(name_or_json)
    if name_or_json == "native":
        return native()
    for target in X86_TARGETS:
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
    arch = triple.split("-")[0] or here
    if arch != here:
        raise UsageError(
            f"the target's triple '{triple}' is for {arch}, and only {here} is supported: leave 'mtriple' out."
        )
    llvm.check(description)
    return Target(
        name="custom",
        summary="given as TVM target JSON",
        tvm=description,
        arch=arch,
        features=llvm.code_features(description),
    )
