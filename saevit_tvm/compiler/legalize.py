"""How the few operators are spelled out that TVM lowers badly, or not at all.

GELU would become one call of libm's erf a number; transposed convolutions have no channels-last form. What takes the
larger or the smaller of two numbers would lose one that is none: a ReLU would make 0 of it; and so would what is
multiplied by zero, or asks whether a number is not at most another. What reads a table would read anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx, topi

Pair = Callable[[Any, Any], Any]


def _gelu(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    def gelu(x: te.Tensor) -> te.Tensor:
        erf = topi.fast_erf(topi.multiply(x, tirx.const(math.sqrt(0.5), x.dtype)))
        half = tirx.const(0.5, x.dtype)
        return te.compute(x.shape, lambda *i: x(*i) * (half + half * erf(*i)), name="gelu")

    return builder.call_te(gelu, call.args[0], primfunc_name_hint="gelu")


def _conv2d_transpose(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    attrs = call.attrs
    strides = [int(step) for step in attrs.strides]
    kernel = [int(extent) for extent in call.args[1].ty.shape]
    dilation = [int(step) for step in attrs.dilation]
    channels_last = attrs.data_layout == "NHWC"
    upsampling = (
        attrs.groups == kernel[0]
        and kernel[1] == 1
        and kernel[2:] == strides
        and not any([*attrs.padding, *attrs.output_padding])
        and dilation == [1, 1]
    )

    def scatter(x: te.Tensor, weight: te.Tensor) -> te.Tensor:
        # Windows do not overlap: every output is one input times one weight.
        n, h, w, c = x.shape
        shape = (n, h * strides[0], w * strides[1], c)

        def element(b, y, x_, k):
            weight_at = weight[k, 0, y % strides[0], x_ % strides[1]]
            return x[b, y // strides[0], x_ // strides[1], k] * weight_at

        return te.compute(shape, element, name="conv2d_transpose_scatter")

    def general(x: te.Tensor, weight: te.Tensor) -> te.Tensor:
        data = topi.transpose(x, (0, 3, 1, 2)) if channels_last else x
        if any(step != 1 for step in dilation):
            weight = topi.nn.dilate(weight, [1, 1, *dilation])  # TVM's own would leave dilation out
        extra = [int(pad) for pad in attrs.output_padding]
        out = topi.nn.group_conv2d_transpose_nchw(
            data, weight, strides, list(attrs.padding), x.dtype, extra, int(attrs.groups)
        )
        return topi.transpose(out, (0, 2, 3, 1)) if channels_last else out

    compute = scatter if upsampling and channels_last else general
    return builder.call_te(compute, call.args[0], call.args[1], primfunc_name_hint="conv2d_transpose")


# The larger and the smaller ------------------------------------------------------


def _larger(a: Any, b: Any) -> Any:
    """NaN where one of the two is: there no comparison holds, and their sum is NaN, too."""
    return tirx.Select(a >= b, a, tirx.Select(b > a, b, a + b))


def _smaller(a: Any, b: Any) -> Any:
    return tirx.Select(a <= b, a, tirx.Select(b < a, b, a + b))


def _bounded(x: Any, low: float, high: float) -> Any:
    """Within bounds; an infinite one is none."""
    if math.isfinite(low):
        least = tirx.const(low, x.ty.dtype)
        x = tirx.Select(x < least, least, x)
    if math.isfinite(high):
        most = tirx.const(high, x.ty.dtype)
        x = tirx.Select(x > most, most, x)
    return x


def _dtype(expr: relax.Expr) -> str:
    return str(expr.ty.dtype).removeprefix("T.")


def _is_float(expr: relax.Expr) -> bool:
    return _dtype(expr).startswith(("float", "bfloat"))


def _elements(builder: relax.BlockBuilder, call: relax.Call, low: float, high: float, name: str) -> relax.Expr:
    def bounded(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: _bounded(x(*i), low, high), name=name)

    return builder.call_te(bounded, call.args[0], primfunc_name_hint=name)


def _relu(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    return _elements(builder, call, 0.0, math.inf, "relu")


def _clip(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    low, high = (float(getattr(bound, "value", bound)) for bound in call.args[1:])
    return _elements(builder, call, low, high, "clip") if _is_float(call) else _by_tvm("relax.clip", builder, call)


def _joined(builder: relax.BlockBuilder, call: relax.Call, combine: Pair, name: str) -> relax.Expr:
    """Of two tensors, which are repeated as numpy does it."""
    if not _is_float(call):
        return _by_tvm(f"relax.{name}", builder, call)

    def joined(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        def at(x: te.Tensor, place: tuple[Any, ...]) -> Any:
            own = place[len(place) - len(x.shape) :]
            return x(*(0 if int(extent) == 1 else i for extent, i in zip(x.shape, own, strict=True)))

        return te.compute(call.ty.shape.values, lambda *i: combine(at(a, i), at(b, i)), name=name)

    return builder.call_te(joined, *call.args, primfunc_name_hint=name)


def _reducer(combine: Pair, name: str) -> Any:
    """From what every number replaces on: infinity, where the type has one."""
    start, whole = (-math.inf, tirx.min_value) if name == "max" else (math.inf, tirx.max_value)
    return te.comm_reducer(combine, lambda dtype: _start(start, whole, dtype), name=name)


def _start(start: float, whole: Any, dtype: Any) -> Any:
    return tirx.const(start, dtype) if "float" in str(dtype) else whole(dtype)


def _reduced(builder: relax.BlockBuilder, call: relax.Call, combine: Pair, name: str) -> relax.Expr:
    """Over some axes."""
    if not _is_float(call):
        return _by_tvm(f"relax.{name}", builder, call)
    rank = len(call.args[0].ty.shape)
    over = set(range(rank)) if call.attrs.axis is None else {int(axis) % rank for axis in call.attrs.axis}

    def reduced(x: te.Tensor) -> te.Tensor:
        axes = {axis: te.reduce_axis((0, x.shape[axis]), f"r{axis}") for axis in sorted(over)}

        def element(*place: Any) -> Any:
            kept = iter([i for axis, i in enumerate(place) if not (call.attrs.keepdims and axis in over)])
            where = [axes[axis] if axis in over else next(kept) for axis in range(rank)]
            return _reducer(combine, name)(x(*where), axis=[*axes.values()])

        return te.compute(call.ty.shape.values, element, name=name)

    return builder.call_te(reduced, call.args[0], primfunc_name_hint=name)


def _place(builder: relax.BlockBuilder, call: relax.Call, extreme: Any) -> relax.Expr:
    """Where the largest or the smallest number stands: the first of equal ones, and before all what is no number."""
    x, dtype = call.args[0], str(call.ty.dtype)
    if call.attrs.axis is None:
        x = builder.emit(relax.op.reshape(x, (-1,)))
    rank = len(x.ty.shape)
    axis = 0 if call.attrs.axis is None else int(call.attrs.axis) % rank
    length = int(x.ty.shape[axis])
    there = relax.op.equal(x, builder.emit(extreme(x, axis, keepdims=True)))
    if _is_float(x):
        there = relax.op.logical_or(there, relax.op.isnan(x))
    places = np.arange(length).reshape(-1, *[1] * (rank - 1 - axis))
    found = relax.op.where(there, relax.const(places, dtype), relax.const(length, dtype))
    first = builder.emit(relax.op.min(builder.emit(found), axis))
    return builder.normalize(relax.op.reshape(first, call.ty.shape))


def _compared(builder: relax.BlockBuilder, call: relax.Call, name: str) -> relax.Expr:
    """Of a number with itself: how a graph asks what is no number, and what TVM takes for always the same."""
    x, other = call.args
    if not (x.same_as(other) and _is_float(x)):
        return _by_tvm(f"relax.{name}", builder, call)
    missing = builder.normalize(relax.op.isnan(x))
    return builder.normalize(missing if name == "not_equal" else relax.op.logical_not(missing))


def _denied(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """By bits: TVM would turn `not a <= b` into `a > b`, which is another thing where one of them is no number."""
    x = call.args[0]
    if "bool" in str(x.ty.dtype):
        return builder.normalize(relax.op.bitwise_not(x))
    return builder.normalize(relax.op.equal(x, relax.const(0, _dtype(x))))


def _multiplied(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """Zero is read from memory: TVM knows that nothing is left of a number, and forgets what is none, or infinite."""
    if not (_is_float(call) and any(_is_zero(each) for each in call.args)):
        return _by_tvm("relax.multiply", builder, call)
    return builder.call_te(topi.multiply, *call.args, primfunc_name_hint="multiply")


def _is_zero(x: relax.Expr) -> bool:
    return isinstance(x, tvm.ir.GenericConst) and not x.value.numpy().any()


def _max_pool2d(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    attrs = call.attrs
    above, left = (int(each) for each in attrs.padding[:2])
    strides, dilation, size = ([int(e) for e in of] for of in (attrs.strides, attrs.dilation, attrs.pool_size))
    rows, columns = attrs.layout.index("H"), attrs.layout.index("W")

    def pooled(x: te.Tensor) -> te.Tensor:
        dy, dx = (te.reduce_axis((0, extent), name) for extent, name in zip(size, ("dy", "dx"), strict=True))
        least = _start(-math.inf, tirx.min_value, x.dtype)

        def element(*place: Any) -> Any:
            y = place[rows] * strides[0] + dy * dilation[0] - above
            across = place[columns] * strides[1] + dx * dilation[1] - left
            where = [{rows: y, columns: across}.get(axis, i) for axis, i in enumerate(place)]
            inside = tirx.all(y >= 0, y < x.shape[rows], across >= 0, across < x.shape[columns])
            return _reducer(_larger, "max")(tirx.if_then_else(inside, x(*where), least), axis=[dy, dx])

        return te.compute(call.ty.shape.values, element, name="max_pool2d")

    return builder.call_te(pooled, call.args[0], primfunc_name_hint="max_pool2d")


def _take(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """A place that is not in the table is the nearest that is: as TVM has it, such a read ends the process."""
    if call.attrs.mode == "fast":
        call = builder.normalize(relax.op.take(*call.args, call.attrs.axis, "clip"))
    return _by_tvm("relax.take", builder, call)


def _by_tvm(operator: str, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """As TVM lowers it: whole numbers are numbers."""
    from tvm.ir import Op

    return Op.get(operator).get_attr("FLegalize")(builder, call)


OPERATORS = {
    "relax.nn.gelu": _gelu,
    "relax.nn.conv2d_transpose": _conv2d_transpose,
    "relax.nn.relu": _relu,
    "relax.clip": _clip,
    "relax.maximum": partial(_joined, combine=_larger, name="maximum"),
    "relax.minimum": partial(_joined, combine=_smaller, name="minimum"),
    "relax.max": partial(_reduced, combine=_larger, name="max"),
    "relax.min": partial(_reduced, combine=_smaller, name="min"),
    "relax.argmax": partial(_place, extreme=relax.op.max),
    "relax.argmin": partial(_place, extreme=relax.op.min),
    "relax.equal": partial(_compared, name="equal"),
    "relax.not_equal": partial(_compared, name="not_equal"),
    "relax.logical_not": _denied,
    "relax.multiply": _multiplied,
    "relax.nn.max_pool2d": _max_pool2d,
    "relax.take": _take,
}
