"""Resizing pictures in every way that PyTorch knows; TVM rounds otherwise, and has no antialiasing.

Each way is linear, and works on rows and columns one after the other. So PyTorch itself says, by resizing the unit
matrix, which numbers of a line make up a number of the result, and how much each has to say.
"""

from __future__ import annotations

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
    x = arguments(node, op)["input" if "vec" in node.target.__name__ else "self"]
    sizes = tuple(node.meta["val"].shape[-2:])
    for axis in (2, 3):
        if sizes[axis - 2] != shape(x)[axis]:
            x = _resized(op, x, axis, _shares(node, x, axis))
    return x


def _shares(node: Any, x: relax.Expr, axis: int) -> np.ndarray:
    """[numbers of the result, numbers of x] along one axis."""
    base = node.target.__name__.partition(".")[0]
    names = [each.name for each in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    scales = given.get("scale_factors") or (given.get("scales_h"), given.get("scales_w"))
    corners = [given["align_corners"]] if "align_corners" in names else []
    length, wanted = shape(x)[axis], node.meta["val"].shape[axis]
    scale = None if given.get("output_size") is not None and "scale_factors" in names else scales[axis - 2]
    resize = getattr(torch.ops.aten, base).default
    # Two columns: of a picture one column wide, antialiasing takes rows for columns.
    lines = torch.eye(length).reshape(1, length, length, 1).repeat(1, 1, 1, 2)
    return resize(lines, [wanted, 2], *corners, scale, None)[0, :, :, 0].T.numpy()


def _resized(op: Emitter, x: relax.Expr, axis: int, shares: np.ndarray) -> relax.Expr:
    most = max(1, int((shares != 0).sum(1).max()))
    if most > FEW:
        return _product(op, x, axis, shares)
    places = [np.flatnonzero(row) for row in shares]
    total = None
    for k in range(most):
        # A line with fewer of them reads its first one again, for nothing.
        place = [row[k] if k < len(row) else row[0] for row in places]
        share = [row[at[k]] if k < len(at) else 0.0 for row, at in zip(shares, places, strict=True)]
        value = op.take(x, indices(place), axis=axis)
        if not np.all(np.equal(share, 1.0)):
            wide = np.asarray(share, "float32").reshape(-1, *([1] * (3 - axis)))
            value = op.multiply(value, relax.const(wide, dtype(x)))
        total = value if total is None else op.add(total, value)
    return total


def _product(op: Emitter, x: relax.Expr, axis: int, shares: np.ndarray) -> relax.Expr:
    if axis == 3:
        return op.matmul(x, relax.const(np.ascontiguousarray(shares.T), dtype(x)))
    return op.matmul(relax.const(np.ascontiguousarray(shares), dtype(x)), x)
