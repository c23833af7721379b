"""One of many: TVM takes no place counted from the end, and no depth in a list."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, known, shape

OPERATORS = ("Hardmax", "OneHot")


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr | None:
    if len(shape(inputs[0])) == 0:
        return None
    return _of_places(inputs, attributes, op) if len(_given(inputs)) == 3 else _of_largest(inputs[0], attributes, op)


def _given(inputs: Any) -> list[relax.Expr]:
    return [each for each in inputs if each is not None]


def _of_places(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    places, depth, values = op.astype(inputs[0], "int64"), known(inputs[1]), known(inputs[2])
    if depth is None or values is None:
        raise ValueError("how many classes there are, or their two values, depends on the picture")
    count, rank = int(depth.reshape(-1)[0]), len(shape(places))
    axis = attributes.get("axis", -1) % (rank + 1)
    wrapped = op.where(op.less(places, _whole(0)), op.add(places, _whole(count)), places)
    is_one = op.equal(op.expand_dims(wrapped, axis), _range(count, rank - axis))
    off, on = (relax.const(value, str(values.dtype)) for value in values)
    return op.where(is_one, on, off)


def _of_largest(x: relax.Expr, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    extents = shape(x)
    if op.importer.opset < 13:  # all axes from one on are one
        axis = attributes.get("axis", 1) % len(extents)
        x, last = op.reshape(x, [int(np.prod(extents[:axis])), int(np.prod(extents[axis:]))]), 1
    else:
        last = attributes.get("axis", -1) % len(extents)
    is_one = op.equal(op.argmax(x, last, keepdims=True), _range(shape(x)[last], len(shape(x)) - 1 - last))
    return op.reshape(op.astype(is_one, dtype(x)), extents)


def _whole(value: int) -> relax.Expr:
    return relax.const(value, "int64")


def _range(count: int, behind: int) -> relax.Expr:
    """Numbers from zero on, with as many axes behind them."""
    return relax.const(np.arange(count).reshape(-1, *[1] * behind), "int64")
