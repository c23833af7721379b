"""Resizing pictures in every way that PyTorch knows; TVM rounds otherwise, and has no antialiasing.

Each way is linear, and works on rows and columns one after the other. So PyTorch itself says, by resizing the unit
matrix, which numbers of a line make up a number of the result, and how much each has to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, dtype, indices, shape

OPERATORS = (
    "upsample_nearest2d.vec",
    "upsample_nearest2d.default",
    "_upsample_nearest_exact2d.vec",
    "_upsample_nearest_exact2d.default",
    "upsample_bilinear2d.vec",
    "upsample_bilinear2d.default",
    "upsample_bicubic2d.vec",
    "upsample_bicubic2d.default",
    "_upsample_bilinear2d_aa.vec",
    "_upsample_bilinear2d_aa.default",
    "_upsample_bicubic2d_aa.vec",
    "_upsample_bicubic2d_aa.default",
)

FEW = 16  # numbers of a line that are added up one by one; more are a product with a matrix


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    x = given["input"] if "input" in given else given["self"]
    for axis in (2, 3):
        if node.meta["val"].shape[axis] != shape(x)[axis]:
            x = _resized(op, x, axis, _shares(node, given, shape(x)[axis], axis))
    return x


def _shares(node: Any, given: dict[str, Any], length: int, axis: int) -> np.ndarray:
    """[numbers of the result, numbers of a line] along one axis."""
    if "scale_factors" in given:  # they count only where no size is given
        factors = None if given["output_size"] else given["scale_factors"]
        scale = factors[axis - 2] if factors else None
    else:
        scale = given["scales_h" if axis == 2 else "scales_w"]
    corners = [given["align_corners"]] if "align_corners" in given else []
    resize = getattr(torch.ops.aten, node.target.__name__.partition(".")[0]).default
    # Two columns: of a picture one column wide, antialiasing takes rows for columns.
    lines = torch.eye(length).reshape(1, length, length, 1).repeat(1, 1, 1, 2)
    return resize(lines, [node.meta["val"].shape[axis], 2], *corners, scale, None)[0, :, :, 0].T.numpy()


def _resized(op: Emitter, x: relax.Expr, axis: int, shares: np.ndarray) -> relax.Expr:
    most = max(1, int((shares != 0).sum(1).max()))
    if most > FEW:
        return _product(op, x, axis, shares)
    total = None
    for places, share in _in_turns(shares, most):
        value = op.take(x, indices(places), axis=axis)
        if not np.all(share == 1.0):
            wide = share.astype("float32").reshape(-1, *([1] * (3 - axis)))
            value = op.multiply(value, relax.const(wide, dtype(x)))
        total = value if total is None else op.add(total, value)
    return total


def _in_turns(shares: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first number that each result is made of and its share, then the second, and so on.

    A result of fewer numbers reads its first one again, for nothing.
    """
    numbers = [np.flatnonzero(row) for row in shares]
    for k in range(most):
        places = [row[k] if k < len(row) else (row[0] if len(row) else 0) for row in numbers]
        there = np.array([k < len(row) for row in numbers])
        yield np.array(places), np.where(there, shares[np.arange(len(shares)), places], 0.0)


def _product(op: Emitter, x: relax.Expr, axis: int, shares: np.ndarray) -> relax.Expr:
    if axis == 3:
        return op.matmul(x, relax.const(np.ascontiguousarray(shares.T), dtype(x)))
    return op.matmul(relax.const(np.ascontiguousarray(shares), dtype(x)), x)
