"""Convolutions that read between pixels, each tap where an offset says: four reads, and a convolution 1x1 of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, shape

OPERATORS = ("DeformConv",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    x, weight, offset, bias, mask = [*inputs, None, None][:5]
    parts, groups = int(attributes.get("offset_group", 1)), int(attributes.get("group", 1))
    n, channels = shape(x)[:2]
    outputs, a_group, *kernel = shape(weight)
    places, taps = shape(offset)[2:], kernel[0] * kernel[1]
    width = channels // parts
    # All channels of a pixel are read at once, so they come last.
    x = op.permute_dims(x, [0, 2, 3, 1])
    offset = op.permute_dims(op.reshape(offset, [n, parts, taps, 2, *places]), [1, 3, 0, 4, 5, 2])
    if mask is not None:
        mask = op.permute_dims(op.reshape(mask, [n, parts, taps, *places]), [1, 0, 3, 4, 2])
    read = []
    for part in range(parts):
        at = [_places(op, offset, part, axis, kernel, attributes) for axis in (0, 1)]
        value = _between(op, op.strided_slice(x, [3], [part * width], [(part + 1) * width]), *at)
        if mask is not None:
            factor = op.strided_slice(mask, [0], [part], [part + 1])
            value = op.multiply(value, op.reshape(factor, [n, *places, taps, 1]))
        read.append(value)
    columns = op.reshape(op.concat(read, axis=4), [n, *places, taps, groups, a_group])
    columns = op.reshape(op.permute_dims(columns, [0, 4, 3, 5, 1, 2]), [n, channels * taps, *places])
    flat = op.reshape(op.permute_dims(weight, [0, 2, 3, 1]), [outputs, taps * a_group, 1, 1])
    total = op.nn.conv2d(columns, flat, groups=groups)
    return total if bias is None else op.add(total, op.reshape(bias, [1, outputs, 1, 1]))


def _places(
    op: Emitter, offset: relax.Expr, part: int, axis: int, kernel: list[int], attributes: dict[str, Any]
) -> relax.Expr:
    """Rows (0) or columns (1) that each tap of each result reads: (n, high, wide, taps)."""
    _, _, n, *places, taps = shape(offset)
    stride, dilation = (int(attributes.get(name, (1, 1))[axis]) for name in ("strides", "dilations"))
    pad = int(attributes.get("pads", (0, 0, 0, 0))[axis])
    tap = np.indices(kernel)[axis].reshape(taps) * dilation
    regular = np.indices(places)[axis][..., None] * stride - pad + tap
    moved = op.strided_slice(offset, [0, 1], [part, axis], [part + 1, axis + 1])
    return op.add(op.reshape(moved, [n, *places, taps]), relax.const(regular.astype(dtype(offset)), dtype(offset)))


def _between(op: Emitter, x: relax.Expr, rows: relax.Expr, columns: relax.Expr) -> relax.Expr:
    """The channels at these places, by how near the four pixels around are; beside the picture there is nothing."""
    n, high, wide, channels = shape(x)
    flat = op.reshape(x, [n * high * wide, channels])
    picture = relax.const((np.arange(n) * (high * wide)).reshape(n, 1, 1, 1).astype("int32"), "int32")
    total = None
    for row, near in _pixels(op, rows, high):
        for column, near_too in _pixels(op, columns, wide):
            place = op.add(op.add(op.multiply(row, relax.const(wide, "int32")), column), picture)
            value = op.reshape(op.take(flat, op.reshape(place, [-1]), axis=0), [*shape(rows), channels])
            value = op.multiply(value, op.expand_dims(op.multiply(near, near_too), -1))
            total = value if total is None else op.add(total, value)
    return total


def _pixels(op: Emitter, at: relax.Expr, length: int) -> list[tuple[relax.Expr, relax.Expr]]:
    """The pixel before and the one behind: their places, and their shares."""

    def number(value: float) -> relax.Expr:
        return relax.const(value, dtype(at))

    first = op.floor(at)
    behind = op.subtract(at, first)
    found = []
    for place, share in ((first, op.subtract(number(1.0), behind)), (op.add(first, number(1.0)), behind)):
        inside = op.clip(place, 0.0, length - 1.0)
        share = op.where(op.equal(place, inside), share, op.multiply(share, number(0.0)))
        # Behind what is no number there is no place, and nothing is to be read where none is.
        found.append((op.clip(op.astype(inside, "int32"), 0, length - 1), share))
    return found
