"""CIFFN: expand, depthwise 3x3, GELU, decompose and redistribute, project, residual.

The redistribution `z + g * (z - GELU(conv1x1(z)))` adds to every channel what the common part of all channels is not.
"""

from __future__ import annotations

from tvm.relax.dpl import is_const, is_op

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
    multiply,
    per_channel,
    pointwise_weights,
    reading,
    wildcard,
)


def regions() -> list[Region]:
    x, gain = wildcard(), is_const()
    expand = Conv(x)
    depthwise = Conv(expand.pattern)
    hidden = gelu(depthwise.pattern)
    decompose = Conv(hidden)
    common = gelu(decompose.pattern)
    apart = is_op("relax.subtract")(hidden, common)
    gained = multiply(gain, apart)
    redistributed = add(hidden, gained)
    project = Conv(redistributed)
    block = add(x, project.pattern)
    parts = {
        "x": x,
        "gain": gain,
        **expand.parts("expand"),
        **depthwise.parts("depthwise"),
        **decompose.parts("decompose"),
        **project.parts("project"),
    }
    steps = (
        Step("relax.nn.conv2d", depthwise.pattern),
        Step("relax.nn.gelu", hidden),
        Step("relax.nn.conv2d", decompose.pattern),
        Step("relax.nn.gelu", common),
        Step("relax.subtract", apart),
        Step("relax.multiply", gained),
        Step("relax.add", redistributed),
        Step("relax.nn.conv2d", project.pattern),
        Step("relax.add", block),
    )
    return [Region("ciffn", block, parts, _read, steps)]


def _read(parts: Parts) -> Reading | None:
    pointwise = all(is_pointwise(parts, name) for name in ("expand", "decompose", "project"))
    if not pointwise or not is_depthwise_3x3(parts, "depthwise"):
        return None
    hidden = extents(parts["expand.weight"])[0]
    gain = per_channel(parts["gain"], hidden)
    if gain is None or extents(parts["decompose.weight"])[0] != 1:
        return None
    decompose = pointwise_weights(parts, "decompose", "dec")
    weights = {
        **pointwise_weights(parts, "expand", "ex"),
        **depthwise_weights(parts, "depthwise", "dw"),
        "dec_w": decompose["dec_w"].reshape(-1),
        "dec_b": decompose["dec_b"],
        "g": gain,
        **pointwise_weights(parts, "project", "pr"),
    }
    return reading("ciffn", {"x": parts["x"]}, weights, extents(parts["x"]))
