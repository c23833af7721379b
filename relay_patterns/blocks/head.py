"""The head: the mean over all positions, then a linear layer. BatchNorm has been folded into the layer before."""

from __future__ import annotations

from tvm.relax.dpl import is_const, is_op

from relay_patterns.region import Parts, Reading, Region, add, array, extents, per_channel, reading, wildcard


def regions() -> list[Region]:
    x, weight, offset = wildcard(), is_const(), is_const()
    mean = is_op("relax.mean")(x)
    product = is_op("relax.matmul")(mean, weight)
    scores = add(product, offset)
    return [Region("head", scores, {"x": x, "mean": mean, "weight": weight, "bias": offset}, _read)]


def _read(parts: Parts) -> Reading | None:
    axes = sorted(int(axis) for axis in parts["mean"].attrs.axis)
    shape = extents(parts["x"])
    if len(shape) != 4 or axes != [2, 3] or parts["mean"].attrs.keepdims or len(extents(parts["weight"])) != 2:
        return None
    classes = extents(parts["weight"])[1]
    offset = per_channel(parts["bias"], classes, rank=2)
    if offset is None:
        return None
    weights = {"w": array(parts["weight"]), "b": offset}
    return reading("head", {"x": parts["x"]}, weights, (shape[0], classes))
