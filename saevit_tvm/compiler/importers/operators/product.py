"""The product of all numbers along an axis."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments

OPERATORS = ("prod.dim_int",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    wanted = op.importer._convert_data_type(node.meta["val"].dtype)
    return op.prod(op.astype(given["self"], wanted), given["dim"], keepdims=given["keepdim"])
