"""What onnxruntime's optimiser writes in place of several operators, in these again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, shape
from saevit_tvm.compiler.importers.onnx_operators.attention import PLACES, apart, attended, together

OPERATORS = (
    *("FusedConv", "FusedGemm", "FusedMatMul", "MultiHeadAttention", "QuickGelu"),
    *("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    return RULES[attributes["tvm_custom"]["operator"]](op, [*inputs, *[None] * 10], attributes)


def _activated(op: Emitter, x: relax.Expr, attributes: dict[str, Any], *numbers: float) -> relax.Expr:
    name = attributes["activation"].decode()
    alpha, beta = (*numbers, 0.0, 0.0)[:2]
    if name == "Clip":
        return op.clip(x, alpha, beta)
    if name == "HardSigmoid":
        return op.clip(op.add(op.multiply(x, relax.const(alpha, dtype(x))), relax.const(beta, dtype(x))), 0.0, 1.0)
    known = {
        "Relu": op.nn.relu,
        "Sigmoid": op.sigmoid,
        "Tanh": op.tanh,
        "LeakyRelu": lambda x: op.nn.leakyrelu(x, alpha),
    }
    if name not in known:
        raise ValueError(f"its activation {name} has no rule")
    return known[name](x)


def _conv(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    x = op.importer.by_tvm("Conv", inputs[:3], attributes)
    x = x if inputs[3] is None else op.add(x, inputs[3])
    return _activated(op, x, attributes, *attributes.get("activation_params", ()))


def _gemm(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    numbers = (attributes.get(f"activation_{name}", 0.0) for name in ("alpha", "beta"))
    return _activated(op, op.importer.by_tvm("Gemm", inputs[:3], attributes), attributes, *numbers)


def _matmul(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    if attributes.get("transBatchA") or attributes.get("transBatchB"):
        raise ValueError("a product whose batches are turned has no rule")
    a, b = (
        _turned(op, each) if attributes.get(name) else each
        for each, name in zip(inputs[:2], ("transA", "transB"), strict=True)
    )
    return op.multiply(op.matmul(a, b), relax.const(attributes.get("alpha", 1.0), dtype(a)))


def _turned(op: Emitter, x: relax.Expr) -> relax.Expr:
    rank = len(shape(x))
    return op.permute_dims(x, [*range(rank - 2), rank - 1, rank - 2]) if rank > 1 else x


def _quick_gelu(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    x = inputs[0]
    return op.multiply(x, op.sigmoid(op.multiply(x, relax.const(attributes.get("alpha", 1.702), dtype(x)))))


def _norm(op: Emitter, x: relax.Expr, weight: relax.Expr, bias: relax.Expr | None, epsilon: float) -> relax.Expr:
    bias = relax.op.zeros_like(weight) if bias is None else bias
    return op.nn.layer_norm(x, weight, bias, axes=[-1], epsilon=epsilon)


def _root_norm(op: Emitter, x: relax.Expr, weight: relax.Expr, epsilon: float) -> relax.Expr:
    square = op.mean(op.multiply(x, x), [-1], keepdims=True)
    return op.multiply(op.multiply(x, op.rsqrt(op.add(square, relax.const(epsilon, dtype(x))))), weight)


def _simplified_norm(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    if attributes.get("axis", -1) % len(shape(inputs[0])) != len(shape(inputs[0])) - 1:
        raise ValueError("a norm of more than the last axis has no rule")
    return _root_norm(op, inputs[0], inputs[1], attributes.get("epsilon", 1e-5))


def _of_sum(norm: Callable[..., relax.Expr], count: int) -> Callable[..., relax.Expr]:
    """The norm of a sum of two, which is given, too; a bias behind the norm's weights is added before."""

    def rule(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
        total = op.add(inputs[0], inputs[1])
        weights, bias = inputs[2 : 2 + count], inputs[2 + count]
        total = total if bias is None else op.add(total, bias)
        value = norm(op, total, *weights, attributes.get("epsilon", 1e-12))
        outputs = attributes["tvm_custom"]["num_outputs"]
        return value if outputs == 1 else op.tuple(value, total, total, total)

    return rule


def _attention(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    query, key, value, bias, padding, mask, *past = inputs[:8]
    if key is None or value is None or padding is not None or any(each is not None for each in past):
        raise ValueError("queries, keys and values in one tensor, lengths, and earlier tokens have no rule")
    if attributes["tvm_custom"]["num_outputs"] > 1 or attributes.get("unidirectional"):
        raise ValueError("keys and values as outputs, and a mask that hides later tokens, have no rule")
    heads, parts = attributes["num_heads"], [query, key, value]
    if bias is not None:
        ends = [sum(shape(each)[-1] for each in parts[:at]) for at in range(4)]
        parts = [
            op.add(each, op.strided_slice(bias, [0], [begin], [end]))
            for each, (begin, end) in zip(parts, itertools.pairwise(ends), strict=True)
        ]
    query, key, value = (each if len(shape(each)) == PLACES else apart(op, each, heads) for each in parts)
    scale = attributes.get("scale") or 1 / math.sqrt(shape(query)[3])
    return together(op, attended(op, query, key, value, mask, scale))


RULES: dict[str, Callable[..., relax.Expr]] = {
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "MultiHeadAttention": _attention,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _simplified_norm,
    "SkipLayerNormalization": _of_sum(_norm, 2),
    "SkipSimplifiedLayerNormalization": _of_sum(_root_norm, 1),
}
