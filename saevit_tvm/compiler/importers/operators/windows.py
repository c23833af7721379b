"""Sliding windows along one axis, and pictures put together of patches that overlap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, indices, shape

OPERATORS = ("unfold.default", "col2im.default")


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    return _unfolded(op, given) if "unfold" in node.target.__name__ else _folded(op, given)


def _unfolded(op: Emitter, given: dict[str, Any]) -> relax.Expr:
    """Windows stand where the axis was, what is in them comes last."""
    x, extents = given["self"], shape(given["self"])
    axis, size, step = given["dimension"] % len(extents), given["size"], given["step"]
    count = (extents[axis] - size) // step + 1
    place = np.arange(count)[:, None] * step + np.arange(size)
    taken = op.take(x, indices(place.reshape(-1)), axis=axis)
    apart = op.reshape(taken, (*extents[:axis], count, size, *extents[axis + 1 :]))
    rest = [each for each in range(len(extents) + 1) if each != axis + 1]
    return op.permute_dims(apart, [*rest, axis + 1])


def _folded(op: Emitter, given: dict[str, Any]) -> relax.Expr:
    """Of every patch, each position by itself: spread by the stride, moved to its place, all added up."""
    x, (high, wide), kernel = given["self"], given["output_size"], given["kernel_size"]
    dilation, padding, stride = (given[name] for name in ("dilation", "padding", "stride"))
    n, together, _ = shape(x)
    channels = together // math.prod(kernel)
    sizes = (high + 2 * padding[0], wide + 2 * padding[1])
    counts = [(s - d * (k - 1) - 1) // step + 1 for s, d, k, step in zip(sizes, dilation, kernel, stride, strict=True)]
    patches = op.reshape(x, (n, channels, *kernel, *counts))
    total = None
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            one = op.strided_slice(patches, [2, 3], [i, j], [i + 1, j + 1])
            one = op.reshape(one, (n, channels, *counts))
            for axis, at in ((2, i), (3, j)):
                one = _spread(op, one, axis, stride[axis - 2], at * dilation[axis - 2], sizes[axis - 2])
            total = one if total is None else op.add(total, one)
    begin, end = padding, [padding[0] + high, padding[1] + wide]
    return op.strided_slice(total, [2, 3], list(begin), end)


def _spread(op: Emitter, x: relax.Expr, axis: int, step: int, first: int, length: int) -> relax.Expr:
    """An axis of `length`, with the numbers of x every `step` from `first` on, and zeros between them."""
    extents = list(shape(x))
    if step > 1:
        apart = [*extents[: axis + 1], 1, *extents[axis + 1 :]]
        pads = [0] * (2 * len(apart))
        pads[2 * (axis + 1) + 1] = step - 1
        spread = op.nn.pad(op.reshape(x, apart), pads)
        extents[axis] *= step
        x = op.reshape(spread, extents)
    if first + extents[axis] > length:
        x = op.strided_slice(x, [axis], [0], [length - first])
        extents[axis] = length - first
    pads = [0] * (2 * len(extents))
    pads[2 * axis : 2 * axis + 2] = [first, length - first - extents[axis]]
    return op.nn.pad(x, pads)
