"""Resizing pictures in every way that PyTorch knows; TVM rounds otherwise, and has no antialiasing.

Each way is linear, and works on rows and columns one after the other. So PyTorch itself says, by resizing the unit
matrix, which numbers of a line make up a number of the result, and how much each has to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from saevit_tvm.compiler.importers.lines import mixed
from saevit_tvm.compiler.importers.node import Emitter, arguments, shape

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


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    x = given["input"] if "input" in given else given["self"]
    for axis in (2, 3):
        if node.meta["val"].shape[axis] != shape(x)[axis]:
            x = mixed(op, x, axis, _shares(node, given, shape(x)[axis], axis))
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
