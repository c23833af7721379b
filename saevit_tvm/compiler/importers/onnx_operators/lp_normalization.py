"""Numbers along an axis, divided by their length."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter

OPERATORS = ("LpNormalization",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    x, axis = inputs[0], attributes.get("axis", -1)
    if attributes.get("p", 2) == 1:
        return op.divide(x, op.sum(op.abs(x), axis, keepdims=True))
    return op.divide(x, op.sqrt(op.sum(op.multiply(x, x), axis, keepdims=True)))
