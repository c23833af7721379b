"""The largest and the smallest along axes, and where they are. TVM has no rule for most, and sorts for the others."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments

OPERATORS = ("amax.default", "amin.default", "max.dim", "min.dim")


def convert(node: Any, op: Emitter) -> relax.Expr:
    given, name = arguments(node, op), node.target.__name__
    extreme, place = (op.max, op.argmax) if "max" in name else (op.min, op.argmin)
    x, axis, keep = given["self"], given["dim"], given["keepdim"]
    if name.startswith("a"):
        return extreme(x, list(axis) or None, keepdims=keep)
    value = extreme(x, axis, keepdims=keep)
    return op.tuple(value, place(x, axis, keepdims=keep))
