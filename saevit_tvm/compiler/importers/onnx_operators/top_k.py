"""The largest or the smallest few, without a sort of the runtime's."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, known, shape
from saevit_tvm.compiler.importers.operators.order import ordered

OPERATORS = ("TopK",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    x, count = inputs[0], known(inputs[1])
    if count is None:
        raise ValueError("how many of the largest numbers are taken depends on the picture")
    axis = attributes.get("axis", -1) % len(shape(x))
    return op.tuple(*ordered(op, x, axis, bool(attributes.get("largest", 1)), int(count.reshape(-1)[0])))
