"""How the few operators are spelled out that TVM lowers badly, or not at all.

GELU would become one call of libm's erf a number; transposed convolutions have no channels-last form.
"""

from __future__ import annotations

import math

from tvm import relax, te, tirx, topi


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
    channels_last = attrs.data_layout == "NHWC"
    upsampling = (
        attrs.groups == kernel[0]
        and kernel[1] == 1
        and kernel[2:] == strides
        and not any([*attrs.padding, *attrs.output_padding])
        and all(int(step) == 1 for step in attrs.dilation)
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
        extra = [int(pad) for pad in attrs.output_padding]
        out = topi.nn.group_conv2d_transpose_nchw(
            data, weight, strides, list(attrs.padding), x.dtype, extra, int(attrs.groups)
        )
        return topi.transpose(out, (0, 2, 3, 1)) if channels_last else out

    compute = scatter if upsampling and channels_last else general
    return builder.call_te(compute, call.args[0], call.args[1], primfunc_name_hint="conv2d_transpose")


OPERATORS = {"relax.nn.gelu": _gelu, "relax.nn.conv2d_transpose": _conv2d_transpose}
