"""Why a region that should be there was not found: how far its pattern goes, and the first operator that differs."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from relay_patterns.region import Region, extents


def first_difference(func: relax.Function, variants: Sequence[Region]) -> str | None:
    """One sentence for the longest beginning of a region in the graph, or None when not even that is there."""
    values = relax.analysis.get_var2val(func)
    calls = [(var, value) for var, value in values.items() if isinstance(value, relax.Call)]
    for depth in range(max(len(region.steps) for region in variants) - 1, -1, -1):
        for region in variants:
            if depth < len(region.steps):
                found = [pair for pair in calls if region.steps[depth].pattern.match(pair[1], values)]
                if found:
                    return _describe(func, region, depth, found[0])
    return None


def _describe(func: relax.Function, region: Region, depth: int, begin: tuple[relax.Var, relax.Call]) -> str:
    var, last = begin
    shape = "x".join(str(extent) for extent in extents(var))
    if depth == len(region.steps) - 1:
        return f"{region.name} at {shape} has the right operators, but other strides, paddings, groups or axes"
    # A step may be written in several ways, of which the shortest was met first: go on while it is still this step.
    pattern, values = region.steps[depth].pattern, relax.analysis.get_var2val(func)
    users = _users(func, var)
    while following := [(user, value) for user, value in users if pattern.match(value, values)]:
        var, last = following[0]
        users = _users(func, var)
    followers = sorted({_name(value) for _, value in users}) or ["the end of the model"]
    needed = region.steps[depth + 1].op
    return f"{region.name} at {shape} needs {needed} after {_name(last)}, and the model has {' and '.join(followers)}"


def _users(func: relax.Function, var: relax.Var) -> list[tuple[relax.Var, relax.Call]]:
    """The operators that use a value; a reshape is looked through, as it does no work."""
    users: list[tuple[relax.Var, relax.Call]] = []
    for user, value in relax.analysis.get_var2val(func).items():
        if isinstance(value, relax.Call) and any(var.same_as(arg) for arg in value.args):
            users += _users(func, user) if _name(value) == "relax.reshape" else [(user, value)]
    return users


def _name(expr: relax.Call) -> str:
    op = expr.op
    return op.name if isinstance(op, tvm.ir.Op) else "another region"
