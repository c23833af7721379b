"""Sampling at computed places: TVM wants the two coordinates on another axis than PyTorch has them."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments

OPERATORS = ("grid_sampler_2d.default",)
METHODS = ("bilinear", "nearest", "bicubic")
PADDING = ("zeros", "border", "reflection")


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    grid = op.permute_dims(given["grid"], [0, 3, 1, 2])
    return op.image.grid_sample(
        given["input"],
        grid,
        method=METHODS[given["interpolation_mode"]],
        layout="NCHW",
        padding_mode=PADDING[given["padding_mode"]],
        align_corners=given["align_corners"],
    )
