"""Reading a picture at computed places, between its pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, shape

BICUBIC = "bicubic"
SHARPNESS = -0.75  # of the cubic curve, as PyTorch and ONNX have it
TAPS = 4  # pixels a line that a value is made of


def sampled(op: Emitter, x: relax.Expr, grid: relax.Expr, method: str, padding: str, corners: bool) -> relax.Expr:
    """`grid` has the coordinates on its last axis, where TVM wants them on the second."""
    if method == BICUBIC:
        return _bicubic(op, x, grid, padding, corners)
    rank = len(shape(x))
    return op.image.grid_sample(
        x,
        op.permute_dims(grid, [0, rank - 1, *range(1, rank - 1)]),
        method=method,
        layout="NCHW" if rank == 4 else "NCDHW",
        padding_mode=padding,
        align_corners=corners,
    )


def _bicubic(op: Emitter, x: relax.Expr, grid: relax.Expr, padding: str, corners: bool) -> relax.Expr:
    """Rows and columns by themselves: TVM mirrors each of the 16 places in whole numbers, which takes it minutes."""
    n, channels, high, wide = shape(x)
    places = shape(grid)[1:3]
    flat = op.reshape(op.permute_dims(x, [1, 0, 2, 3]), [channels, n * high * wide])
    picture = relax.const(np.arange(n).repeat(places[0] * places[1]) * (high * wide), "int32")

    def along(axis: int, length: int) -> list[tuple[relax.Expr, relax.Expr]]:
        at = op.reshape(op.strided_slice(grid, [3], [axis], [axis + 1]), [-1])
        return list(_taps(op, at, length, padding, corners))

    columns, total = along(0, wide), None
    for row, share in along(1, high):
        for column, part in columns:
            place = op.add(op.add(op.multiply(row, relax.const(wide, "int32")), column), picture)
            value = op.multiply(op.take(flat, place, axis=1), op.multiply(share, part))
            total = value if total is None else op.add(total, value)
    return op.permute_dims(op.reshape(total, [channels, n, *places]), [1, 0, 2, 3])


def _taps(
    op: Emitter, at: relax.Expr, length: int, padding: str, corners: bool
) -> Iterator[tuple[relax.Expr, relax.Expr]]:
    """The pixels next to a coordinate between -1 and 1: the place of each, and its share."""

    def number(value: float) -> relax.Expr:
        return relax.const(value, dtype(at))

    scale, shift = ((length - 1) / 2, (length - 1) / 2) if corners else (length / 2, (length - 1) / 2)
    at = op.add(op.multiply(at, number(scale)), number(shift))
    first = op.floor(at)
    behind = op.subtract(at, first)
    for tap in range(TAPS):
        place = op.add(first, number(tap - 1))
        apart = op.add(behind, number(1 - tap)) if tap < 2 else op.subtract(number(tap - 1), behind)
        share = _share(op, apart, near=tap in (1, 2))
        if padding == "reflection":
            place = _mirrored(op, place, 0.0 if corners else -0.5, length - 1.0 if corners else length - 0.5)
        inside = op.clip(place, 0.0, length - 1.0)
        if padding == "zeros":
            share = op.where(op.equal(place, inside), share, number(0.0))
        # Behind what is no number there is no place, and nothing is to be read where none is.
        yield op.clip(op.astype(inside, "int32"), 0, length - 1), share


def _share(op: Emitter, apart: relax.Expr, near: bool) -> relax.Expr:
    """By how far a pixel is away: up to one, or from one to two."""
    a = SHARPNESS
    powers = (a + 2, -(a + 3), 0.0, 1.0) if near else (a, -5 * a, 8 * a, -4 * a)
    total = relax.const(powers[0], dtype(apart))
    for each in powers[1:]:
        total = op.add(op.multiply(total, apart), relax.const(each, dtype(apart)))
    return total


def _mirrored(op: Emitter, place: relax.Expr, low: float, high: float) -> relax.Expr:
    """Back and forth between two bounds."""

    def number(value: float) -> relax.Expr:
        return relax.const(value, dtype(place))

    span = high - low
    if span == 0:
        return op.multiply(place, number(0.0))
    far = op.abs(op.subtract(place, number(low)))
    turns = op.floor(op.divide(far, number(2 * span)))
    rest = op.subtract(far, op.multiply(turns, number(2 * span)))
    return op.subtract(number(low + span), op.abs(op.subtract(rest, number(span))))
