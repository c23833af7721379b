"""What of the imported graph becomes one kernel each: blocks first, then primitives with all that follows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tvm import relax

from relay_patterns.blocks import blocks
from relay_patterns.epilogue import continued
from relay_patterns.graph import Graph
from relay_patterns.near_miss import first_difference
from relay_patterns.primitives import PRIMITIVES
from relay_patterns.region import Reading, Region
from schedules.spec import FLOAT, KernelSpec

__all__ = ["Accepts", "Reading", "Region", "blocks", "find_blocks", "find_primitives", "missed"]

Accepts = Callable[[KernelSpec], bool]  # whether there is a kernel for a spec
Found = dict[relax.Var, Reading]  # by the variable that has the result
Finder = Callable[[relax.Var], Iterator[tuple[relax.Var, Reading]]]


def find_blocks(func: relax.Function, accepts: Accepts) -> Found:
    """Every match of a block that `accepts` agrees to."""
    graph = Graph(func)

    def read(region: Region, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
        is_call = graph.call(var) is not None
        matched = region.pattern.extract_matched_expr(graph.values[var], graph.values) if is_call else None
        if matched is not None:
            parts = {part: matched[each] for part, each in region.parts.items() if each in matched}
            reading = region.read(parts)
            if reading is not None:
                reading = reading._replace(inputs=tuple(map(graph.variable, reading.inputs)))
                yield from continued(graph, var, reading) if region.continues else [(var, reading)]

    return _found(graph, [partial(read, region) for region in blocks()], accepts)


def find_primitives(func: relax.Function, accepts: Accepts) -> Found:
    """Every primitive that `accepts` agrees to, with as much of what follows it as it agrees to.

    The last ones come first: where two could take what adds them up, it is the one that is computed later.
    """
    graph = Graph(func)
    graph.order.reverse()
    return _found(graph, [partial(primitive, graph) for primitive in PRIMITIVES], accepts)


def _found(graph: Graph, finders: Sequence[Finder], accepts: Accepts) -> Found:
    """The first finder takes what it can of the whole graph, then the next; nothing is taken twice."""
    found: Found = {}
    taken: set[relax.Var] = set()
    for finder in finders:
        for var in graph.order:
            for result, reading in finder(var) if var not in taken else ():
                inner = graph.between(reading.begins or reading.inputs, result)
                if inner is None or (inner | {result}) & taken or not all(map(_is_float, (var, *reading.inputs))):
                    continue
                if accepts(reading.spec):
                    found[result] = reading
                    taken |= inner | {result}
                    break
    return found


def _is_float(var: relax.Expr) -> bool:
    """Kernels take float32 and give it; what is stored otherwise is decided later."""
    return not isinstance(var.ty, relax.TensorType) or str(var.ty.dtype).removeprefix("T.") == FLOAT


def missed(func: relax.Function, name: str) -> str | None:
    """Why a block that should be in the graph is not: the first operator that differs from its pattern."""
    return first_difference(func, [region for region in blocks() if region.name == name])
