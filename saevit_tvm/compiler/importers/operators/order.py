"""Sorting, the largest few, and running sums, without a sort of the runtime's: they run on every device.

A value's rank is how many come before it. So what has rank r is a sum over the axis, and nothing has to be moved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, dtype, shape

OPERATORS = ("sort.default", "sort.stable", "topk.default", "argsort.default", "argsort.stable", "cumsum.default")
LONGEST = 4096  # numbers: work grows with the square


def convert(node: Any, op: Emitter) -> relax.Expr:
    given, name = arguments(node, op), node.target.__name__.partition(".")[0]
    x = given["self"]
    if not shape(x):
        raise ValueError("a single number has no order")
    axis = given["dim"] % len(shape(x))
    if name == "cumsum":
        wanted = op.importer._convert_data_type(node.meta["val"].dtype)
        x = _to_last(op, _within_reach(x, axis), axis)
        return _to_last(op, _running_sum(op, op.astype(x, wanted)), axis, back=True)
    falling = given["largest"] if name == "topk" else given["descending"]
    value, place = ordered(op, x, axis, falling, given["k"] if name == "topk" else shape(x)[axis])
    return place if name == "argsort" else op.tuple(value, place)


def ordered(op: Emitter, x: relax.Expr, axis: int, falling: bool, count: int) -> tuple[relax.Expr, relax.Expr]:
    """The first `count` numbers along an axis, and where they stood."""
    x = _to_last(op, _within_reach(x, axis), axis)
    place = _order(op, _rank(op, x, falling), count)
    value = op.gather_elements(x, place, axis=-1)
    return _to_last(op, value, axis, back=True), _to_last(op, place, axis, back=True)


def _within_reach(x: relax.Expr, axis: int) -> relax.Expr:
    if shape(x)[axis] > LONGEST:
        raise ValueError(f"an order of {shape(x)[axis]} numbers is more than the {LONGEST} that there are loops for")
    return x


def _to_last(op: Emitter, x: relax.Expr, axis: int, back: bool = False) -> relax.Expr:
    order = [each for each in range(len(shape(x))) if each != axis] + [axis]
    if axis == len(order) - 1:
        return x
    return op.permute_dims(x, [order.index(each) for each in range(len(order))] if back else order)


def _rank(op: Emitter, x: relax.Expr, falling: bool) -> relax.Expr:
    """How many come before each: as PyTorch counts, which takes what is not a number for the largest of all."""
    length, kind = shape(x)[-1], dtype(x)
    mine, other = op.expand_dims(x, -1), op.expand_dims(x, -2)
    before = (op.greater if falling else op.less)(other, mine)
    tie = op.equal(other, mine)
    if kind.startswith(("float", "bfloat")):
        lost, other_lost = op.isnan(mine), op.isnan(other)
        first, last = (other_lost, lost) if falling else (lost, other_lost)
        before = op.logical_or(before, op.greater(op.astype(first, "int32"), op.astype(last, "int32")))
        tie = op.logical_or(tie, op.logical_and(lost, other_lost))
    earlier = relax.const(np.tri(length, k=-1, dtype=bool))  # of those that tie, the one that stands first
    before = op.logical_or(before, op.logical_and(tie, earlier))
    return op.sum(op.astype(before, "int32"), -1)


def _order(op: Emitter, rank: relax.Expr, count: int) -> relax.Expr:
    """Where the first `count` stand."""
    length = shape(rank)[-1]
    has = op.equal(op.expand_dims(rank, -2), relax.const(np.arange(count, dtype="int32")[:, None], "int32"))
    places = relax.const(np.arange(length, dtype="int64"), "int64")
    return op.sum(op.where(has, places, relax.const(0, "int64")), -1)


def _running_sum(op: Emitter, x: relax.Expr) -> relax.Expr:
    length, kind = shape(x)[-1], dtype(x)
    upto = relax.const(np.tri(length, dtype=bool))
    return op.sum(op.where(upto, op.expand_dims(x, -2), relax.const(0, kind)), -1)
