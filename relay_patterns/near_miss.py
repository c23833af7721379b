"""Why a region that should be there was not found: how far its pattern goes, and the first operator that differs."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax

from relay_patterns.graph import Graph
from relay_patterns.region import Region, extents


def first_difference(func: relax.Function, variants: Sequence[Region]) -> str | None:
    """One sentence for the longest beginning of a region in the graph, or None when not even that is there."""
    graph = Graph(func)
    calls = [var for var in graph.order if graph.call(var) is not None]
    for depth in range(max(len(region.steps) for region in variants) - 1, -1, -1):
        for region in variants:
            if depth < len(region.steps):
                pattern = region.steps[depth].pattern
                found = [var for var in calls if pattern.match(graph.values[var], graph.values)]
                if found:
                    return _describe(graph, region, depth, found[0])
    return None


def _describe(graph: Graph, region: Region, depth: int, begin: relax.Var) -> str:
    var = begin
    shape = "x".join(str(extent) for extent in extents(var))
    if depth == len(region.steps) - 1:
        return f"{region.name} at {shape} has the right operators, but other strides, paddings, groups or axes"
    # A step may be written in several ways, of which the shortest was met first: go on while it is still this step.
    pattern = region.steps[depth].pattern
    while following := [user for user in _users(graph, var) if pattern.match(graph.values[user], graph.values)]:
        var = following[0]
    followers = sorted({_name(graph, user) for user in _users(graph, var)}) or ["the end of the model"]
    needed = region.steps[depth + 1].op
    last = _name(graph, var)
    return f"{region.name} at {shape} needs {needed} after {last}, and the model has {' and '.join(followers)}"


def _users(graph: Graph, var: relax.Var) -> list[relax.Var]:
    """The operators that use a value; a reshape is looked through, as it does no work."""
    users: list[relax.Var] = []
    for user in graph.users(var):
        if graph.call(user) is not None:
            users += _users(graph, user) if _name(graph, user) == "relax.reshape" else [user]
    return users


def _name(graph: Graph, var: relax.Var) -> str:
    name = str(graph.values[var].op.name)
    return "another region" if name == "relax.call_tir" else name
