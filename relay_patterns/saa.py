"""SAA: layer norm, one token a window, attention among the tokens, deconvolution, residual. The heart of the model.

A window's token is the sum of its positions weighted by the softmax of their saliency. A relative that averages its
window (as EdgeViT does) is the same algebra with a saliency of zero; at rate 1 every position is a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.relax.dpl import DFPattern, is_const, is_op, is_tuple_get_item, wildcard

from relay_patterns.region import Parts, Reading, Region, Step, array, either_order, extents, image

Part = Callable[..., Any]
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # channels last, channels first


class _Steps:
    """Names every step of a chain, so that a match can be checked for what its operators really do."""

    def __init__(self) -> None:
        self.parts: dict[str, DFPattern] = {}
        self.steps: list[Step] = []

    def __call__(self, name: str, pattern: DFPattern) -> DFPattern:
        self.parts[name] = pattern
        return pattern

    def op(self, name: str, op: str, *args: DFPattern) -> DFPattern:
        pattern = self(name, is_op(op)(*args))
        self.steps.append(Step(op, pattern))
        return pattern

    def permute(self, name: str, data: DFPattern) -> DFPattern:
        return self.op(name, "relax.permute_dims", data)

    def linear(self, name: str, data: DFPattern) -> DFPattern:
        weight, bias = self(f"{name}_w", is_const()), self(f"{name}_b", is_const())
        pattern = either_order("relax.add", self.op(f"{name}_product", "relax.matmul", data, weight), bias)
        self.steps.append(Step("relax.add", pattern))
        return pattern


def saa() -> list[Region]:
    """One region for each way to sample and each way to take query, key and value apart."""
    samplings = (_weighted_windows, _mean_windows, None)
    return [_region(sample, apart) for sample in samplings for apart in (_by_split, _by_index)]


def _region(sample: Part | None, apart: Part) -> Region:
    step = _Steps()
    x = step("x", wildcard())
    normal = step.op(
        "norm",
        "relax.nn.layer_norm",
        step.permute("to_last", x),
        step("ln_g", is_const()),
        step("ln_b", is_const()),
    )
    tokens = sample(step, normal) if sample else normal
    mixed = _attention(step, _reshape(tokens), apart)
    spread = step.permute("to_first", _reshape(mixed))
    if sample:
        raised = step.op("up", "relax.nn.conv2d_transpose", spread, step("up_w", is_const()))
        spread = either_order("relax.add", raised, step("up_b", is_const()))
    block = either_order("relax.add", x, spread)
    variant = "_".join(["saa", *(part.__name__.strip("_") for part in (sample, apart) if part)])
    return Region("saa", variant, block, step.parts, _read, (*step.steps, Step("relax.add", block)))


def _weighted_windows(step: _Steps, normal: DFPattern) -> DFPattern:
    """The positions of each window, weighted by the softmax of their saliency."""
    first = step.permute("saliency_first", normal)
    saliency = step.op("saliency", "relax.nn.conv2d", first, step("sal_w", is_const()))
    windows = _windows(step, "saliency", step.permute("saliency_last", saliency))
    share = step.op("share", "relax.nn.softmax", windows)
    weighted = either_order("relax.multiply", share, _windows(step, "token", normal))
    return step.op("sum", "relax.sum", weighted)


def _mean_windows(step: _Steps, normal: DFPattern) -> DFPattern:
    """The plain mean of each window."""
    pooled = step.op("pool", "relax.nn.avg_pool2d", step.permute("pool_first", normal))
    return step.permute("pool_last", pooled)


def _windows(step: _Steps, name: str, data: DFPattern) -> DFPattern:
    return _reshape(step.permute(f"{name}_windows", _reshape(data)))


def _reshape(data: DFPattern) -> DFPattern:
    return is_op("relax.reshape")(data, wildcard())


def _attention(step: _Steps, tokens: DFPattern, apart: Part) -> DFPattern:
    query, turned, value = apart(step, step.linear("qkv", tokens))
    scores = step.op("scores", "relax.matmul", _reshape(query), _reshape(turned))
    scaled = either_order("relax.multiply", _reshape(scores), step("scale", is_const()))
    step.steps.append(Step("relax.multiply", scaled))
    share = step.op("attention", "relax.nn.softmax", scaled)
    mixed = is_op("relax.matmul")(_reshape(share), _reshape(value))
    return step.linear("pr", _reshape(step.permute("joined", _reshape(mixed))))


def _by_split(step: _Steps, qkv: DFPattern) -> tuple[DFPattern, DFPattern, DFPattern]:
    """Query, key and value are thirds of the channels; the key is turned as it is laid out by heads."""
    thirds = step.op("thirds", "relax.split", _reshape(qkv))
    third = [_reshape(is_tuple_get_item(thirds, index)) for index in range(3)]
    step("heads", third[0])
    query, value = step.permute("query", third[0]), step.permute("value", third[2])
    return query, step.permute("turned_last", third[1]), value


def _by_index(step: _Steps, qkv: DFPattern) -> tuple[DFPattern, DFPattern, DFPattern]:
    """Query, key and value are stacked along a new first axis."""
    stacked = step.permute("stacked", step("stack", _reshape(qkv)))
    query, key, value = (
        step.op(name, "relax.take", stacked, step(f"{name}_index", is_const())) for name in ("first", "second", "third")
    )
    return query, step.permute("turned", key), value


def _read(parts: Parts) -> Reading | None:
    _n, c, h, w = extents(parts["x"])
    rate = int(parts["up"].attrs.strides[0]) if "up" in parts else 1
    tokens, heads, width = _heads(parts)
    if not _moves_as_expected(parts) or heads * width != c:
        return None
    weights = {
        "ln_g": array(parts["ln_g"]),
        "ln_b": array(parts["ln_b"]),
        **_sampling(parts, rate, c),
        "qkv_w": array(parts["qkv_w"]),
        "qkv_b": array(parts["qkv_b"]).reshape(-1),
        "pr_w": array(parts["pr_w"]),
        "pr_b": array(parts["pr_b"]).reshape(-1),
    }
    if rate > 1:
        if not _is_upsampling(parts, rate, c) or tokens * rate * rate != h * w or h % rate or w % rate:
            return None
        weights["up_w"] = array(parts["up_w"])[:, 0].transpose(1, 2, 0)
        weights["up_b"] = np.broadcast_to(array(parts["up_b"]).reshape(-1), (c,))
    shape = {
        **image(parts),
        "heads": heads,
        "r": rate,
        "eps": float(parts["norm"].attrs.epsilon),
        "scale": float(array(parts["scale"])),
    }
    return Reading(shape, {name: np.ascontiguousarray(weight) for name, weight in weights.items()})


def _sampling(parts: Parts, rate: int, channels: int) -> dict[str, np.ndarray]:
    """Saliency weights; a plain mean is a softmax over equals."""
    if "sal_w" in parts:
        return {"sal_w": array(parts["sal_w"])[0].transpose(1, 2, 0), "sal_b": np.zeros(1, "float32")}
    if rate > 1:
        return {"sal_w": np.zeros((3, 3, channels), "float32"), "sal_b": np.zeros(1, "float32")}
    return {}


def _moves_as_expected(parts: Parts) -> bool:
    """Every permute, axis and index is the one the algebra needs."""
    axes = {
        "to_last": LAST,
        "to_first": FIRST,
        "saliency_first": FIRST,
        "saliency_last": LAST,
        "pool_first": FIRST,
        "pool_last": LAST,
        "saliency_windows": [0, 1, 3, 2, 4, 5],
        "token_windows": [0, 1, 3, 2, 4, 5],
        "stacked": [2, 0, 3, 1, 4],
        "query": [0, 2, 1, 3],
        "value": [0, 2, 1, 3],
        "turned_last": [0, 2, 3, 1],
        "turned": [0, 1, 3, 2],
        "joined": [0, 2, 1, 3],
    }
    rank = len(extents(parts["x"]))
    return (
        rank == 4
        and all(_axes(parts[name]) == order for name, order in axes.items() if name in parts)
        and [int(axis) % rank for axis in parts["norm"].attrs.axes] == [3]
        and int(parts["attention"].attrs.axis) in (-1, len(extents(parts["attention"])) - 1)
        and _apart_as_expected(parts)
        and array(parts["scale"]).size == 1
        and _samples_as_expected(parts)
    )


def _heads(parts: Parts) -> tuple[int, int, int]:
    """Tokens of an image, heads, and their width."""
    shape = extents(parts["heads"] if "heads" in parts else parts["stack"])
    return (shape[1], shape[-2], shape[-1]) if len(shape) in (4, 5) else (0, 0, 0)


def _apart_as_expected(parts: Parts) -> bool:
    """Query, key and value come in this order, and have the same size."""
    if "thirds" in parts:
        width, total = extents(parts["x"])[1], extents(parts["thirds"].args[0])[-1]
        attrs = parts["thirds"].attrs
        even = [int(at) for at in attrs.indices_or_sections] == [width, 2 * width]
        return even and total == 3 * width and int(attrs.axis) in (-1, 2)
    order = [int(array(parts[f"{name}_index"])) for name in ("first", "second", "third")]
    return order == [0, 1, 2] and extents(parts["stack"])[2] == 3


def _samples_as_expected(parts: Parts) -> bool:
    if "up" not in parts:
        return True
    rate = int(parts["up"].attrs.strides[0])
    if "pool" in parts:
        attrs = parts["pool"].attrs
        return list(attrs.pool_size) == list(attrs.strides) == [rate, rate] and not any(attrs.padding)
    conv = parts["saliency"].attrs
    return (
        extents(parts["sal_w"])[0] == 1
        and extents(parts["sal_w"])[2:] == (3, 3)
        and list(conv.padding) == [1, 1, 1, 1]
        and list(conv.strides) == list(conv.dilation) == [1, 1]
        and int(parts["share"].attrs.axis) == 2
        and extents(parts["share"])[2:] == (rate * rate, 1)
        and [int(axis) for axis in parts["sum"].attrs.axis] == [2]
    )


def _is_upsampling(parts: Parts, rate: int, channels: int) -> bool:
    """A depthwise deconvolution whose windows touch and do not overlap."""
    attrs = parts["up"].attrs
    return (
        extents(parts["up_w"]) == (channels, 1, rate, rate)
        and attrs.groups == channels
        and list(attrs.strides) == [rate, rate]
        and not any([*attrs.padding, *attrs.output_padding])
    )


def _axes(call) -> list[int]:
    return [int(axis) for axis in call.attrs.axes]
