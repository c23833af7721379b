"""Adaptive max pooling: windows whose size differs by one."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, indices, only_first, shape

OPERATORS = ("adaptive_max_pool2d.default", "adaptive_max_pool3d.default")


def convert(node: Any, op: Emitter) -> relax.Expr:
    """One axis after the other: as many values as the longest window has; shorter ones repeat their last."""
    only_first(node, "where the largest values of an adaptive max pool are")
    given = arguments(node, op)
    x = given["self"]
    for axis, length in enumerate(given["output_size"], len(shape(x)) - len(given["output_size"])):
        x = _axis(op, x, axis, length)
    value = x
    return op.tuple(value, value)


def _axis(op: Emitter, x: relax.Expr, axis: int, length: int) -> relax.Expr:
    extent = shape(x)[axis]
    windows = [(i * extent // length, -(-(i + 1) * extent // length)) for i in range(length)]
    longest = max(end - start for start, end in windows)
    result = None
    for k in range(longest):
        taken = op.take(x, indices([min(start + k, end - 1) for start, end in windows]), axis=axis)
        result = taken if result is None else op.maximum(result, taken)
    return result
