"""Division that rounds. TVM knows no numbers of two types, and no floor of float32."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments

OPERATORS = ("div.Tensor_mode", "div.Scalar_mode", "floor_divide.default")


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    wanted = op.importer._convert_data_type(node.meta["val"].dtype)
    a, b = (_as(op, given[name], wanted) for name in ("self", "other"))
    mode = given.get("rounding_mode", "floor")
    if mode is None:
        return op.divide(a, b)
    if wanted.startswith("float"):
        rounded = {"floor": op.floor, "trunc": op.trunc}[mode]
        return rounded(op.divide(a, b))
    if mode == "floor":
        return op.floor_divide(a, b)
    sign = op.multiply(*(_sign(op, each, wanted) for each in (a, b)))
    return op.multiply(sign, op.floor_divide(op.abs(a), op.abs(b)))


def _sign(op: Emitter, value: relax.Expr, dtype: str) -> relax.Expr:
    return op.where(op.less(value, relax.const(0, dtype)), relax.const(-1, dtype), relax.const(1, dtype))


def _as(op: Emitter, value: Any, dtype: str) -> relax.Expr:
    return op.astype(value, dtype) if isinstance(value, relax.Expr) else relax.const(value, dtype)
