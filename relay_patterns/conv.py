"""A dense convolution with its bias, and GELU where it follows: the stem and the downsampling between stages."""

from __future__ import annotations

import numpy as np

from relay_patterns.region import Conv, Parts, Reading, Region, array, bias, extents, gelu, image, wildcard


def conv_gelu() -> Region:
    x = wildcard()
    conv = Conv(x)
    return Region(
        "conv", "conv_gelu", gelu(conv.pattern), {"x": x, **conv.parts("conv")}, lambda parts: _read(parts, "gelu")
    )


def conv() -> Region:
    x = wildcard()
    conv = Conv(x)
    parts = {"x": x, **conv.parts("conv")}
    return Region("conv", "conv", conv.pattern, parts, lambda found: _read(found, None))


def _read(parts: Parts, activation: str | None) -> Reading | None:
    attrs = parts["conv.call"].attrs
    outputs, _inputs, kh, kw = extents(parts["conv.weight"])
    top, left, bottom, right = (int(pad) for pad in attrs.padding)
    stride, across = (int(step) for step in attrs.strides)
    even = top == left == bottom == right and stride == across and kh == kw
    offset = bias(parts, "conv")
    if attrs.groups != 1 or list(attrs.dilation) != [1, 1] or not even or offset is None:
        return None
    shape = {
        **image(parts),
        "k": outputs,
        "kernel": kh,
        "stride": stride,
        "padding": top,
        "activation": activation,
    }
    weight = np.ascontiguousarray(array(parts["conv.weight"]).transpose(2, 3, 1, 0))
    return Reading(shape, {"w": weight, "b": offset})
