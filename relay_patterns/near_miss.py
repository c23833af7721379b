"""Why a region that should be there was not found: how far its pattern goes, and the first operator that differs."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from relay_patterns.region import Region, extents


def first_difference(func: relax.Function, variants: Sequence[Region]) -> str | None:
    """One sentence for the longest beginning of a region in the graph, or None when not even that is there."""
    values = relax.analysis.get_var2val(func)
    for depth in range(max(len(region.steps) for region in variants) - 1, -1, -1):
        for region in variants:
            pattern = region.steps[depth].pattern if depth < len(region.steps) else None
            for var, value in values.items():
                if pattern is not None and isinstance(value, relax.Call) and pattern.match(value, values):
                    return _describe(func, region, depth, var)
    return None


def _describe(func: relax.Function, region: Region, depth: int, var: relax.Var) -> str:
    shape = "x".join(str(extent) for extent in extents(var))
    if depth == len(region.steps) - 1:
        return f"{region.name} at {shape} has the right operators, but other strides, paddings, groups or axes"
    done, needed = region.steps[depth].op, region.steps[depth + 1].op
    followers = sorted({_name(user) for user in _users(func, var)}) or ["the end of the model"]
    return f"{region.name} at {shape} needs {needed} after {done}, and the model has {' and '.join(followers)}"


def _users(func: relax.Function, var: relax.Var) -> list[relax.Call]:
    """The operators that use a value; a reshape is looked through, as it does no work."""
    users: list[relax.Call] = []
    for user, value in relax.analysis.get_var2val(func).items():
        if isinstance(value, relax.Call) and any(var.same_as(arg) for arg in value.args):
            users += _users(func, user) if _name(value) == "relax.reshape" else [value]
    return users


def _name(expr: relax.Call) -> str:
    op = expr.op
    return op.name if isinstance(op, tvm.ir.Op) else "another region"
