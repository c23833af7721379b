"""One place on an axis, perhaps counted from its end, where TVM would read in front of the axis."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, shape

OPERATORS = ("select.int",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    x, axis = given["self"], given["dim"]
    return op.take(x, relax.const(given["index"] % shape(x)[axis], "int64"), axis)
