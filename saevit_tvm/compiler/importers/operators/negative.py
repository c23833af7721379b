"""The imaginary part of a conjugate: a view with its sign turned round when it is read."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments

OPERATORS = ("_neg_view.default",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    return op.negative(arguments(node, op)["self"])
