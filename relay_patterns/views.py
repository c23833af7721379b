"""What only moves numbers (reshapes, permutes, slices, splits) as a view: where they lie in a tensor that is there.

The rules are numpy's, and numpy applies them: to an array of the tensor's shape, of which nobody reads a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from relay_patterns.graph import Graph
from relay_patterns.region import array, extents
from schedules.spec import FLOAT

Arrange = Callable[[np.ndarray], np.ndarray]

IMAGE_AXES = 4
SHAPED = [tvm.ir.Op.get(f"relax.{name}") for name in ("reshape", "squeeze", "expand_dims", "flatten")]
PERMUTE, SLICE, TAKE = (tvm.ir.Op.get(f"relax.{name}") for name in ("permute_dims", "strided_slice", "take"))
SPLIT, ADD, MULTIPLY, MATMUL = (tvm.ir.Op.get(f"relax.{name}") for name in ("split", "add", "multiply", "matmul"))


class View(NamedTuple):
    """Numbers of a base: where the first one lies, and how far apart neighbours along each axis lie.

    They are to be multiplied by a factor. An axis of one number has no neighbours: its stride is 0.
    """

    base: relax.Expr
    shape: tuple[int, ...]  # the base's
    offset: int
    strides: tuple[int, ...]
    factor: float = 1.0

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        """Whether it is all of the base, in order, in another shape."""
        return math.prod(shape) == math.prod(self.shape) and self[2:] == whole(self.base, shape)[2:]


def whole(base: relax.Expr, shape: tuple[int, ...]) -> View:
    """A tensor as it is."""
    return View(base, shape, 0, _strides(np.empty(shape, np.uint8)))


def viewed(graph: Graph, var: relax.Expr, arrange: Arrange, scaled: bool) -> View | None:
    """A value, its axes arranged, as a view of the tensor that lies deepest; its last axis has no gaps.

    What may be `scaled` may have been multiplied by numbers on the way.
    """
    found = None
    for base, moves, factor in _bases(graph, var, scaled):
        memory = np.empty(extents(base), np.uint8)
        seen = _seen(memory, [*moves, arrange])
        if seen is not None and seen.strides[-1] == 1:
            found = View(base, memory.shape, _place(seen) - _place(memory), _strides(seen), factor)
    return found


def _bases(graph: Graph, var: relax.Expr, scaled: bool) -> Iterator[tuple[relax.Expr, list[Arrange], float]]:
    """From the value inwards: what it is moved from, how, and what it is multiplied by."""
    moves: list[Arrange] = []
    factor = 1.0
    while True:
        number = _multiplied(graph, var) if scaled else None
        if number is not None:
            var, by = number
            factor *= by
        found = _moved(graph, var)
        if found is None:
            return
        var, move = found
        moves.insert(0, move)
        if str(var.ty.dtype) == FLOAT and _stays(graph, var):
            yield var, [*moves], factor


def _stays(graph: Graph, var: relax.Expr) -> bool:
    """Whether its axes stay in order: images get their channels last after this. Products of tokens are no images."""
    call = _call(graph, var)
    while call is not None and call.op in (ADD, MULTIPLY):
        call = next((_call(graph, each) for each in call.args if isinstance(each, relax.Var)), None)
    return len(extents(var)) < IMAGE_AXES or (call is not None and call.op == MATMUL)


def _multiplied(graph: Graph, var: relax.Expr) -> tuple[relax.Expr, float] | None:
    """What was moved and then multiplied by a number. What a kernel computed takes the number itself."""
    call = _call(graph, var)
    if call is None or call.op != MULTIPLY:
        return None
    for data, number in (call.args, reversed(call.args)):
        is_number = isinstance(number, tvm.ir.GenericConst) and array(number).size == 1
        if is_number and extents(data) == extents(var) and _moved(graph, data) is not None:
            return data, float(array(number).item())
    return None


def _moved(graph: Graph, var: relax.Expr) -> tuple[relax.Expr, Arrange] | None:
    """What a value is moved from, and how."""
    call, shape = _call(graph, var), extents(var)
    if call is None:
        return _part(graph, var)
    data = call.args[0] if call.args else None
    if not isinstance(data, relax.Var):
        return None
    if call.op in SHAPED and not _has_heads_joined(graph, data):
        return data, lambda seen: seen.reshape(shape)
    if call.op == PERMUTE:
        axes = None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes]
        return data, lambda seen: seen.transpose(axes)
    if call.op == SLICE and len(call.args) == 5:
        axes, begins, ends, steps = ([int(number) for number in part] for part in call.args[1:])
        cuts = dict(zip(axes, map(slice, begins, ends, steps), strict=True))
        return _cut(data, cuts, shape) if min(steps) > 0 else None
    if call.op == TAKE and call.attrs.axis is not None and isinstance(call.args[1], tvm.ir.GenericConst):
        place = array(call.args[1])
        return _cut(data, {int(call.attrs.axis): int(place)}, shape) if place.ndim == 0 else None
    return None


def _has_heads_joined(graph: Graph, var: relax.Expr) -> bool:
    """Whether it may be an attention's result, of which the kernel gives what lies behind the reshape."""
    call = _call(graph, var)
    return call is not None and call.op == MATMUL and all(isinstance(factor, relax.Var) for factor in call.args)


def _part(graph: Graph, var: relax.Expr) -> tuple[relax.Expr, Arrange] | None:
    """A part of a split."""
    item = graph.values.get(var) if isinstance(var, relax.Var) else None
    if not isinstance(item, relax.TupleGetItem):
        return None
    split = _call(graph, item.tuple_value)
    if split is None or split.op != SPLIT or not isinstance(split.args[0], relax.Var):
        return None
    given, shape, cuts = extents(split.args[0]), extents(var), split.attrs.indices_or_sections
    axis = int(split.attrs.axis) % len(given)
    if isinstance(cuts, tvm_ffi.Array):
        first = [0, *map(int, cuts)][item.index]
    else:
        first = -(-given[axis] // int(cuts)) * item.index
    return _cut(split.args[0], {axis: slice(first, first + shape[axis])}, shape)


def _cut(
    data: relax.Expr, cuts: Mapping[int, slice | int], shape: tuple[int, ...]
) -> tuple[relax.Expr, Arrange] | None:
    """Some places along axes; None where numpy would find others than TVM does."""
    rank = len(extents(data))
    places = tuple({axis % rank: cut for axis, cut in cuts.items()}.get(axis, slice(None)) for axis in range(rank))
    return (data, lambda seen: seen[places]) if np.empty(extents(data), np.uint8)[places].shape == shape else None


def _call(graph: Graph, var: relax.Expr) -> relax.Call | None:
    return graph.call(var) if isinstance(var, relax.Var) else None


def _seen(memory: np.ndarray, moves: list[Arrange]) -> np.ndarray | None:
    """What moves make of an array; None where numpy had to copy it."""
    seen = memory
    for move in moves:
        seen = move(seen)
        if not np.may_share_memory(seen, memory):
            return None
    return seen


def _place(seen: np.ndarray) -> int:
    return int(seen.__array_interface__["data"][0])


def _strides(seen: np.ndarray) -> tuple[int, ...]:
    return tuple(step if extent > 1 else 0 for step, extent in zip(seen.strides, seen.shape, strict=True))
