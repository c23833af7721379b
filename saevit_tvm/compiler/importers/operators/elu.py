"""ELU and SELU, which torch.export writes as ELU with two factors; TVM reads neither of them."""

from __future__ import annotations

from typing import Any

from tvm import relax

OPERATORS = ("elu.default",)


def convert(node: Any, importer: Any) -> relax.Expr:
    """scale * x above zero, scale * alpha * (exp(input_scale * x) - 1) below."""
    x = importer.env[node.args[0]]
    given = dict(zip(("alpha", "scale", "input_scale"), node.args[1:], strict=False)) | node.kwargs
    alpha, scale, input_scale = (float(given.get(name, 1.0)) for name in ("alpha", "scale", "input_scale"))

    def times(value: relax.Expr, factor: float) -> relax.Expr:
        return value if factor == 1.0 else relax.op.multiply(value, relax.const(factor, x.ty.dtype))

    power = relax.op.exp(times(x, input_scale))
    below = relax.op.nn.relu(relax.op.subtract(relax.const(1.0, x.ty.dtype), power))
    above = times(relax.op.nn.relu(x), scale)
    return importer.block_builder.emit(relax.op.subtract(above, times(below, scale * alpha)))
