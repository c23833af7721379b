"""MobileNetV4's universal inverted bottleneck: 1x1, ReLU, perhaps depthwise and ReLU, 1x1, and what follows.

A depthwise convolution before the block has no activation behind it and is a kernel of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm.relax.dpl import DFPattern, is_op

from relay_patterns.region import (
    Conv,
    Parts,
    Reading,
    Region,
    Step,
    array,
    bias,
    extents,
    is_pointwise,
    pointwise_weights,
    reading,
    wildcard,
)


def regions() -> list[Region]:
    """With and without the depthwise convolution; a residual is what follows it."""
    return [_region(depthwise) for depthwise in (True, False)]


def _region(depthwise: bool) -> Region:
    x = wildcard()
    expand = Conv(x)
    active = _relu(expand.pattern)
    parts = {"x": x, **expand.parts("expand")}
    steps = [Step("relax.nn.conv2d", expand.pattern), Step("relax.nn.relu", active)]
    if depthwise:
        middle = Conv(active)
        active = _relu(middle.pattern)
        parts |= middle.parts("depthwise")
        steps += [Step("relax.nn.conv2d", middle.pattern), Step("relax.nn.relu", active)]
    project = Conv(active)
    block = project.pattern
    steps.append(Step("relax.nn.conv2d", block))
    parts |= {"result": block, **project.parts("project")}
    return Region("uib", block, parts, partial(_read, depthwise=depthwise), tuple(steps), continues=True)


def _relu(data: DFPattern) -> DFPattern:
    return is_op("relax.nn.relu")(data)


def _read(parts: Parts, depthwise: bool) -> Reading | None:
    if not (is_pointwise(parts, "expand") and is_pointwise(parts, "project")):
        return None
    weights = pointwise_weights(parts, "expand", "ex")
    attrs: dict[str, Any] = {"activation": "relu"}
    if depthwise:
        call, (channels, within, _, _) = parts["depthwise.call"].attrs, extents(parts["depthwise.weight"])
        offset = bias(parts, "depthwise")
        if within != 1 or call.groups != channels or list(call.dilation) != [1, 1] or offset is None:
            return None
        weights |= {"dw_w": array(parts["depthwise.weight"])[:, 0].transpose(1, 2, 0), "dw_b": offset}
        attrs |= {name: tuple(map(int, getattr(call, name))) for name in ("strides", "padding")}
    weights |= pointwise_weights(parts, "project", "pr")
    return reading("uib", {"x": parts["x"]}, weights, extents(parts["result"]), attrs, ["bias"])
