"""Squares and cubes as products: TVM would compute the general power, of which there are no vectors."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, known, shape

OPERATORS = ("Pow",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr | None:
    x, power = inputs[0], known(inputs[1])
    if not isinstance(x.ty, relax.TensorType) or not dtype(x).startswith("float"):
        return None
    if power is None or power.ndim > len(shape(x)) or power.size != 1 or power.item() not in (2, 3):
        return None
    square = op.multiply(x, x)
    return square if power.item() == 2 else op.multiply(square, x)
