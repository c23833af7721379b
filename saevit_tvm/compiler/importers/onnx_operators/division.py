"""Division of whole numbers, which is cut off towards zero where TVM takes the floor."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype

OPERATORS = ("Div",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr | None:
    a, b = inputs
    if not all(isinstance(each.ty, relax.TensorType) and dtype(each).startswith("int") for each in (a, b)):
        return None
    none = relax.const(0, dtype(a))
    size = op.floor_divide(op.abs(a), op.abs(b))
    differ = op.logical_xor(op.less(a, none), op.less(b, none))
    return op.where(differ, op.negative(size), size)
