"""Max pooling that says where its values stand, for which TVM has zeros: needed to put them back there."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, dtype, shape

OPERATORS = ("max_pool2d_with_indices.default",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    x = given["self"]
    kernel, stride, padding, dilation = (
        [*given[name], *given[name]][:2] for name in ("kernel_size", "stride", "padding", "dilation")
    )
    stride = stride or kernel
    value = op.importer._max_pool2d_impl(x, kernel, stride, padding, dilation, given["ceil_mode"])
    if all(user.args[1] == 0 for user in node.users):
        return op.tuple(value, value)
    return op.tuple(value, places(op, x, shape(value), kernel, stride, padding, dilation))


def places(op: Emitter, x: relax.Expr, extents: tuple[int, ...], *window: list[int]) -> relax.Expr:
    """Whatever is larger than all before it in its window takes its place, and so does what is no number."""
    kernel, stride, padding, dilation = window
    rank, lengths = len(shape(x)), extents[-2:]
    largest = relax.const(np.full(extents, -np.inf), dtype(x))
    found = None
    for offsets in itertools.product(*map(range, kernel)):
        number, places, inside = x, [], []
        for axis in (0, 1):
            at = np.arange(lengths[axis]) * stride[axis] - padding[axis] + offsets[axis] * dilation[axis]
            nearest = np.clip(at, 0, shape(x)[rank - 2 + axis] - 1)
            number = op.take(number, relax.const(nearest, "int64"), axis=rank - 2 + axis)
            places.append(nearest)
            inside.append(at == nearest)
        wins = op.logical_or(op.greater(number, largest), op.isnan(number))
        wins = op.logical_and(wins, relax.const(np.outer(*inside)))
        place = places[0][:, None] * shape(x)[-1] + places[1]
        found = relax.const(np.broadcast_to(place, extents), "int64") if found is None else found
        found = op.where(wins, relax.const(place, "int64"), found)
        largest = op.where(wins, number, largest)
    return found
