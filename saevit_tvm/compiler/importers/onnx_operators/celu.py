"""CELU."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype

OPERATORS = ("Celu",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    """x above zero, alpha * (exp(x / alpha) - 1) below."""
    x = inputs[0]
    alpha, one = (relax.const(value, dtype(x)) for value in (attributes.get("alpha", 1.0), 1.0))
    below = op.nn.relu(op.subtract(one, op.exp(op.divide(x, alpha))))
    return op.subtract(op.nn.relu(x), op.multiply(below, alpha))
