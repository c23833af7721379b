"""ELU and SELU, which torch.export writes as ELU with two factors; TVM reads neither of them."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, dtype

OPERATORS = ("elu.default",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    """scale * x above zero, scale * alpha * (exp(input_scale * x) - 1) below."""
    given = arguments(node, op)
    x, (alpha, scale, input_scale) = given["self"], (float(given[name]) for name in ("alpha", "scale", "input_scale"))

    def times(value: relax.Expr, factor: float) -> relax.Expr:
        return value if factor == 1.0 else op.multiply(value, relax.const(factor, dtype(x)))

    power = op.exp(times(x, input_scale))
    below = op.nn.relu(op.subtract(relax.const(1.0, dtype(x)), power))
    above = times(op.nn.relu(x), scale)
    return op.subtract(above, times(below, scale * alpha))
