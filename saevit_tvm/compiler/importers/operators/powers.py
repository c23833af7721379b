"""Powers of two."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, dtype

OPERATORS = ("exp2.default",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    x = arguments(node, op)["self"]
    return op.exp(op.multiply(x, relax.const(math.log(2), dtype(x))))
