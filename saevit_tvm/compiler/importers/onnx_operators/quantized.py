"""Whole numbers of few bits that stand for fractions: products are of float32, exact as long as sums are short.

What is stored is a number times a scale, and counted from a zero of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, shape

OPERATORS = (
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    # onnxruntime's
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QLinearAdd", "QLinearConcat"),
    *("QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid"),
)
FLOAT = "float32"


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    name = attributes["tvm_custom"]["operator"]
    return RULES[name](op, list(inputs), attributes)


def _number(op: Emitter, x: relax.Expr, zero: relax.Expr | None, axis: int | None = None) -> relax.Expr:
    """As it is counted from its zero; `axis` is that of zeros by channel."""
    x = op.astype(x, FLOAT)
    return x if zero is None else op.subtract(x, _beside(op, op.astype(zero, FLOAT), len(shape(x)), axis))


def _beside(op: Emitter, each: relax.Expr, rank: int, axis: int | None) -> relax.Expr:
    """A scale or a zero, one for all or one a channel, beside a tensor of some rank."""
    count = int(np.prod(shape(each)))
    if count == 1:
        return op.reshape(each, [])
    return each if axis is None else op.reshape(each, [count if at == axis % rank else 1 for at in range(rank)])


def _scaled(op: Emitter, x: relax.Expr, scale: relax.Expr, axis: int | None = None) -> relax.Expr:
    return op.multiply(x, _beside(op, scale, len(shape(x)), axis))


def _stored(op: Emitter, x: relax.Expr, zero: relax.Expr) -> relax.Expr:
    """To the nearest whole number, of two the even one, within what its type holds."""
    bounds, zeros = np.iinfo(dtype(zero)), _beside(op, op.astype(zero, FLOAT), len(shape(x)), None)
    return op.astype(op.clip(op.add(op.round(x), zeros), float(bounds.min), float(bounds.max)), dtype(zero))


def _factor(op: Emitter, *scales: relax.Expr) -> relax.Expr:
    """Two scales over a third, in one number, as onnxruntime rounds it."""
    a, b, over = scales
    return op.divide(op.multiply(a, b), over)


def _convolution(op: Emitter, x: relax.Expr, weight: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    return op.importer.by_tvm("Conv", [x, weight], attributes)


def _conv_integer(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    x, weight, zero, weight_zero = (*inputs, None, None)[:4]
    found = _convolution(op, _number(op, x, zero), _number(op, weight, weight_zero, 0), attributes)
    return op.astype(found, "int32")


def _conv(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    x, scale, zero, weight, weight_scale, weight_zero, out_scale, out_zero, bias = (*inputs, None)[:9]
    total = _convolution(op, _number(op, x, zero), _number(op, weight, weight_zero, 0), attributes)
    if bias is not None:
        total = op.add(total, _beside(op, op.astype(bias, FLOAT), len(shape(total)), 1))
    factor = _factor(op, scale, weight_scale, out_scale)
    return _stored(op, _scaled(op, total, factor, 1), out_zero)


def _matmul(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    a, a_scale, a_zero, b, b_scale, b_zero, scale, zero = inputs[:8]
    total = op.matmul(_number(op, a, a_zero, -2), _number(op, b, b_zero, -1))
    if int(np.prod(shape(a_scale))) > 1:
        raise ValueError("a scale for each row of its first tensor has no rule")
    return _stored(op, _scaled(op, total, _factor(op, a_scale, b_scale, scale), -1), zero)


def _matmul_integer(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    a, b, a_zero, b_zero = (*inputs, None, None)[:4]
    return op.astype(op.matmul(_number(op, a, a_zero, -2), _number(op, b, b_zero, -1)), "int32")


def _gemm(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    a, a_scale, a_zero, b, b_scale, b_zero, bias, scale, zero = (*inputs, None, None, None)[:9]
    a = _number(op, a, a_zero)
    b = _number(op, b, b_zero, 0 if attributes.get("transB") else 1)
    a = op.permute_dims(a, [1, 0]) if attributes.get("transA") else a
    b = op.permute_dims(b, [1, 0]) if attributes.get("transB") else b
    total = op.matmul(a, b)
    total = total if bias is None else op.add(total, op.astype(bias, FLOAT))
    factor = op.multiply(op.multiply(a_scale, b_scale), relax.const(attributes.get("alpha", 1.0), FLOAT))
    if scale is None:
        return _scaled(op, total, factor, 1)
    return _stored(op, _scaled(op, total, op.divide(factor, scale), 1), zero)


def _matmul_to_float(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = (*inputs, None, None, None)[:7]
    total = op.matmul(_number(op, a, a_zero), _number(op, b, b_zero, -1))
    found = _scaled(op, _scaled(op, total, a_scale), b_scale, -1)
    return found if bias is None else op.add(found, bias)


def _dynamic_matmul(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    x, weight, weight_scale, weight_zero, bias = (*inputs, None, None)[:5]
    own = op.importer.block_builder.normalize(op.importer.by_tvm("DynamicQuantizeLinear", [x], {}))
    stored, scale, zero = (op.importer.block_builder.emit(relax.TupleGetItem(own, at)) for at in range(3))
    return _matmul_to_float(op, [stored, weight, scale, weight_scale, zero, weight_zero, bias], attributes)


def _of_two(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    a, a_scale, a_zero, b, b_scale, b_zero, scale, zero = inputs[:8]
    numbers = _scaled(op, _number(op, a, a_zero), a_scale), _scaled(op, _number(op, b, b_zero), b_scale)
    combine = op.add if attributes["tvm_custom"]["operator"] == "QLinearAdd" else op.multiply
    return _stored(op, op.divide(combine(*numbers), _beside(op, scale, 0, None)), zero)


def _of_one(function: Callable[..., relax.Expr]) -> Callable[..., relax.Expr]:
    def rule(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
        x, scale, zero, out_scale, out_zero = inputs[:5]
        found = function(op, _scaled(op, _number(op, x, zero), scale), attributes)
        return _stored(op, op.divide(found, _beside(op, out_scale, 0, None)), out_zero)

    return rule


def _mean(op: Emitter, x: relax.Expr, attributes: dict[str, Any]) -> relax.Expr:
    rank = len(shape(x))
    return op.mean(x, list(range(1, rank - 1) if attributes.get("channels_last") else range(2, rank)), keepdims=True)


def _joined(op: Emitter, inputs: list[Any], attributes: dict[str, Any]) -> relax.Expr:
    scale, zero, *parts = inputs
    numbers = [_scaled(op, _number(op, x, of), by) for x, by, of in zip(*[iter(parts)] * 3, strict=True)]
    whole = op.concat(numbers, attributes["axis"])
    return _stored(op, op.divide(whole, _beside(op, scale, 0, None)), zero)


RULES = {
    "ConvInteger": _conv_integer,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulInteger": _matmul_integer,
    "MatMulIntegerToFloat": _matmul_to_float,
    "QGemm": _gemm,
    "QLinearAdd": _of_two,
    "QLinearConcat": _joined,
    "QLinearConv": _conv,
    "QLinearGlobalAveragePool": _of_one(_mean),
    "QLinearLeakyRelu": _of_one(lambda op, x, given: op.nn.leakyrelu(x, given.get("alpha", 0.01))),
    "QLinearMatMul": _matmul,
    "QLinearMul": _of_two,
    "QLinearSigmoid": _of_one(lambda op, x, _: op.sigmoid(x)),
}
