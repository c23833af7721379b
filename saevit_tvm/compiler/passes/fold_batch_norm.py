"""BatchNorm at inference is one multiply and one add a channel, and a neighbour can carry both.

TVM's own pass folds convolution -> BatchNorm only. SAEViT also has BatchNorm *before* a 1x1 convolution (CIFFN) and
before the head (behind the global mean), and both fold as well. What has no such neighbour becomes a multiply and an
add. No BatchNorm is left afterwards.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.relax.dpl import is_const, is_op, is_tuple_get_item, wildcard

from relay_patterns.region import per_channel
from saevit_tvm.compiler.passes.rewriting import Matched, Rule, array, constant, rewrite, shape_of


class _Norm:
    """The pattern of one inference BatchNorm, and the multiply and add that it amounts to."""

    def __init__(self, data) -> None:
        self.data = data
        self.statistics = [is_const() for _ in range(4)]
        self.call = is_op("relax.nn.batch_norm")(data, *self.statistics)
        self.pattern = is_tuple_get_item(self.call, 0)

    def affine(self, matched: Matched) -> tuple[np.ndarray, np.ndarray]:
        gamma, beta, mean, variance = (array(matched[s]).astype("float64") for s in self.statistics)
        attrs = matched[self.call].attrs
        scale = (gamma if attrs.scale else 1.0) / np.sqrt(variance + float(attrs.epsilon))
        return scale, (beta if attrs.center else 0.0) - mean * scale

    def foldable(self, matched: Matched) -> bool:
        """Whether this one normalises channels the way PyTorch lays them out."""
        return int(matched[self.call].attrs.axis) == 1


def _conv_then_norm(with_bias: bool) -> Rule:
    data, weight, bias = wildcard(), is_const(), is_const()
    conv = is_op("relax.nn.conv2d")(data, weight)
    norm = _Norm(is_op("relax.add")(conv, bias) if with_bias else conv)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        if not norm.foldable(matched):
            return expr
        scale, shift = norm.affine(matched)
        kernel = array(matched[weight]) * scale[:, None, None, None]
        if with_bias:
            offset = per_channel(matched[bias], scale.size)
            if offset is None:
                return expr
            shift = shift + offset * scale
        return _conv(matched[conv], matched[data], kernel, shift)

    return norm.pattern, replace


def _norm_then_pointwise_conv(with_bias: bool) -> Rule:
    data, weight, bias = wildcard(), is_const(), is_const()
    norm = _Norm(data)
    conv = is_op("relax.nn.conv2d")(norm.pattern, weight)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        kernel, attrs = array(matched[weight]), matched[conv].attrs
        offset = per_channel(matched[bias], kernel.shape[0]) if with_bias else None
        if with_bias and offset is None:
            return expr
        # A kernel that sees padding cannot take the shift: the zeros outside the image are not shifted.
        if kernel.shape[2:] != (1, 1) or any(attrs.padding) or attrs.groups != 1 or not norm.foldable(matched):
            return expr
        scale, shift = norm.affine(matched)
        shifted = _plus(kernel[:, :, 0, 0] @ shift, offset)
        return _conv(matched[conv], matched[data], kernel * scale[None, :, None, None], shifted)

    return (is_op("relax.add")(conv, bias) if with_bias else conv), replace


def _norm_then_mean_then_linear(with_bias: bool) -> Rule:
    data, weight, bias = wildcard(), is_const(), is_const()
    norm = _Norm(data)
    mean = is_op("relax.mean")(norm.pattern)
    linear = is_op("relax.matmul")(mean, weight)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        attrs, matrix = matched[mean].attrs, array(matched[weight])
        axes = sorted(int(axis) for axis in attrs.axis)
        if axes != [2, 3] or attrs.keepdims or matrix.ndim != 2 or not norm.foldable(matched):
            return expr
        offset = per_channel(matched[bias], matrix.shape[1], rank=2) if with_bias else None
        if with_bias and offset is None:
            return expr
        scale, shift = norm.affine(matched)
        pooled = relax.op.mean(matched[data], axis=[2, 3])
        product = relax.op.matmul(pooled, constant(matrix * scale[:, None]))
        return relax.op.add(product, constant(_plus(shift @ matrix, offset)))

    return (is_op("relax.add")(linear, bias) if with_bias else linear), replace


def _norm_alone() -> Rule:
    data = wildcard()
    norm = _Norm(data)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        scale, shift = norm.affine(matched)
        rank, axis = len(shape_of(matched[data])), int(matched[norm.call].attrs.axis)
        wide = [-1 if dim == axis % rank else 1 for dim in range(rank)]
        scaled = relax.op.multiply(matched[data], constant(scale.reshape(wide)))
        return relax.op.add(scaled, constant(shift.reshape(wide)))

    return norm.pattern, replace


def _plus(shift: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    """The bias that was there joins what folding makes, each rounded to float32 first."""
    return shift if offset is None else shift.astype("float32") + offset


def _conv(like: relax.Call, data: relax.Expr, kernel: np.ndarray, bias: np.ndarray) -> relax.Expr:
    conv = relax.Call(like.op, [data, constant(kernel)], like.attrs)
    return relax.op.add(conv, constant(np.reshape(bias, (1, -1, 1, 1))))


@tvm.ir.transform.module_pass(opt_level=0, name="FoldBatchNorm")
class FoldBatchNorm:
    """Fold every BatchNorm into a neighbour, and the rest into a multiply and an add."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        neighbours = [
            _conv_then_norm(with_bias=True),
            _conv_then_norm(with_bias=False),
            _norm_then_pointwise_conv(with_bias=True),
            _norm_then_pointwise_conv(with_bias=False),
            _norm_then_mean_then_linear(with_bias=True),
            _norm_then_mean_then_linear(with_bias=False),
        ]
        return rewrite(rewrite(mod, neighbours), [_norm_alone()])
