"""Sampling at computed places, in pictures and in stacks of them."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments
from saevit_tvm.compiler.importers.sampling import sampled

OPERATORS = ("grid_sampler_2d.default", "grid_sampler_3d.default")
METHODS = ("bilinear", "nearest", "bicubic")
PADDING = ("zeros", "border", "reflection")


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    method, padding = METHODS[given["interpolation_mode"]], PADDING[given["padding_mode"]]
    return sampled(op, given["input"], given["grid"], method, padding, given["align_corners"])
