"""Norms that give their statistics, too."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, shape

OPERATORS = ("LayerNormalization",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr | None:
    if attributes["tvm_custom"]["num_outputs"] < 2:
        return None
    x = inputs[0]
    axes = list(range(attributes.get("axis", -1) % len(shape(x)), len(shape(x))))
    mean = op.mean(x, axes, keepdims=True)
    apart = op.subtract(x, mean)
    spread = op.mean(op.multiply(apart, apart), axes, keepdims=True)
    share = op.rsqrt(op.add(spread, relax.const(attributes.get("epsilon", 1e-5), dtype(x))))
    value = op.multiply(op.multiply(apart, share), inputs[1])
    return op.tuple(value if inputs[2] is None else op.add(value, inputs[2]), mean, share)
