"""DWSConv: depthwise 3x3, GELU, 1x1, residual. BatchNorm has been folded into both convolutions before."""

from __future__ import annotations

from relay_patterns.region import (
    Conv,
    Parts,
    Reading,
    Region,
    Step,
    add,
    depthwise_weights,
    extents,
    gelu,
    is_depthwise_3x3,
    is_pointwise,
    pointwise_weights,
    reading,
    wildcard,
)


def regions() -> list[Region]:
    x = wildcard()
    depthwise = Conv(x)
    active = gelu(depthwise.pattern)
    pointwise = Conv(active)
    block = add(x, pointwise.pattern)
    parts = {"x": x, **depthwise.parts("depthwise"), **pointwise.parts("pointwise")}
    steps = (
        Step("relax.nn.conv2d", depthwise.pattern),
        Step("relax.nn.gelu", active),
        Step("relax.nn.conv2d", pointwise.pattern),
        Step("relax.add", block),
    )
    return [Region("dwsconv", block, parts, _read, steps)]


def _read(parts: Parts) -> Reading | None:
    if not (is_depthwise_3x3(parts, "depthwise") and is_pointwise(parts, "pointwise")):
        return None
    weights = {
        **depthwise_weights(parts, "depthwise", "dw"),
        **pointwise_weights(parts, "pointwise", "pw"),
    }
    return reading("dwsconv", {"x": parts["x"]}, weights, extents(parts["x"]))
