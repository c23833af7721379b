"""SAA: layer norm, one token a window, attention among the tokens, deconvolution, residual. The heart of the model.

A window's token is the sum of its positions weighted by the softmax of their saliency. A relative that takes the mean
of its window, or the first position of it (as EdgeViT does), is the same algebra with a saliency that is constant; at
rate 1 every position is a token. Windows at the border may be partly filled: the map is padded before, cropped after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.relax.dpl import DFPattern, is_const, is_op, is_tuple_get_item, wildcard

from relay_patterns.region import (
    Parts,
    Reading,
    Region,
    Step,
    add,
    array,
    extents,
    multiply,
    per_channel,
    reading,
    reshaped,
    softmax,
)

Part = Callable[..., Any]
LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # channels last, channels first
NO_SHARE = -1e4  # from here down, a saliency is no share in a softmax of float32


class _Steps:
    """Names every step of a chain, so that a match can be checked for what its operators really do."""

    def __init__(self) -> None:
        self.parts: dict[str, DFPattern] = {}
        self.steps: list[Step] = []

    def __call__(self, name: str, pattern: DFPattern) -> DFPattern:
        self.parts[name] = pattern
        return pattern

    def step(self, op: str, pattern: DFPattern) -> DFPattern:
        """A step that every match has, if only in one of several forms."""
        self.steps.append(Step(op, pattern))
        return pattern

    def op(self, name: str, op: str, *args: DFPattern) -> DFPattern:
        return self.step(op, self(name, is_op(op)(*args)))

    def permute(self, name: str, data: DFPattern) -> DFPattern:
        return self(name, is_op("relax.permute_dims")(data))

    def slice(self, name: str, data: DFPattern) -> DFPattern:
        return self(name, is_op("relax.strided_slice")(data, *(wildcard() for _ in range(4))))

    def biased(self, name: str, data: DFPattern) -> DFPattern:
        return self.step("relax.add", add(data, self(name, is_const())) | data)

    def scaled(self, name: str, data: DFPattern) -> DFPattern:
        return multiply(data, self(name, is_const())) | data

    def linear(self, name: str, data: DFPattern) -> DFPattern:
        product = self.op(f"{name}_product", "relax.matmul", reshaped(data), self(f"{name}_w", is_const()))
        return self.biased(f"{name}_b", product)


def regions() -> list[Region]:
    """One region for each way to sample."""
    return [_region(sample) for sample in (_weighted_windows, _mean_windows, _strides, None)]


def _region(sample: Part | None) -> Region:
    step = _Steps()
    x = step("x", wildcard())
    affine = [step(name, is_const()) for name in ("ln_g", "ln_b")]
    normal = step.op("norm", "relax.nn.layer_norm", step.permute("to_last", x), *affine)
    tokens = sample(step, normal) if sample else normal
    spread = step.step("relax.permute_dims", step.permute("to_first", reshaped(_attention(step, tokens))))
    if sample:
        raised = step.op("up", "relax.nn.conv2d_transpose", spread, step("up_w", is_const()))
        whole = step.biased("up_b", raised)
        spread = step.slice("crop", whole) | whole
    block = step.op("block", "relax.add", x, step("spread", spread))
    return Region("saa", block, step.parts, _read, tuple(step.steps))


def _weighted_windows(step: _Steps, normal: DFPattern) -> DFPattern:
    """The positions of each window, weighted by the softmax of their saliency."""
    first = step.permute("saliency_first", normal)
    saliency = step.op("saliency", "relax.nn.conv2d", first, step("sal_w", is_const()))
    windows = _windows(step, "saliency", step.permute("saliency_last", saliency))
    share = step.op("share", "relax.nn.softmax", windows)
    weighted = step.step("relax.multiply", multiply(share, _windows(step, "token", normal)))
    return step.op("sum", "relax.sum", weighted)


def _windows(step: _Steps, name: str, data: DFPattern) -> DFPattern:
    padded = step(f"{name}_pad", is_op("relax.nn.pad")(data)) | data
    return reshaped(step.permute(f"{name}_windows", reshaped(padded)))


def _mean_windows(step: _Steps, normal: DFPattern) -> DFPattern:
    """The plain mean of each window; of a window of one position, that position."""
    pooled = step.op("pool", "relax.nn.avg_pool2d", step.permute("pool_first", normal))
    return step.permute("pool_last", pooled)


def _strides(step: _Steps, normal: DFPattern) -> DFPattern:
    """The first position of each window."""
    return step.step("relax.strided_slice", step.slice("every", normal))


def _attention(step: _Steps, tokens: DFPattern) -> DFPattern:
    """Between two linear layers, spelled out or kept whole; a scale may be at either operand or at their product."""
    heads, by_token = _apart(step, step.linear("qkv", tokens))
    query, turned, value = heads
    left, right = step.scaled("query_scale", query), step.scaled("key_scale", turned)
    scores = is_op("relax.matmul")(reshaped(left), reshaped(right))
    whole = step("whole", is_op("relax.nn.attention")(*by_token))
    step.step("relax.matmul", scores | whole)
    scaled = step.scaled("scale", reshaped(scores))
    step.step("relax.multiply", scaled | whole)
    plain, safe = softmax(reshaped(scaled), step("infinity", is_const()))
    step("attention", plain)
    share = safe | plain
    step.step("relax.nn.softmax", share | whole)
    mixed = step.step("relax.matmul", is_op("relax.matmul")(reshaped(share), reshaped(value)) | whole)
    return step.linear("pr", step.permute("joined", reshaped(mixed)) | whole)


def _apart(step: _Steps, qkv: DFPattern) -> tuple[list[DFPattern], list[DFPattern]]:
    """Query, key and value by head, the key turned; and all three by token, as an attention kept whole takes them.

    They are thirds of the channels, or stacked along a new first axis.
    """
    thirds = step("thirds", is_op("relax.split")(reshaped(qkv)))
    third = [step(f"third{i}", is_op("relax.reshape")(is_tuple_get_item(thirds, i), wildcard())) for i in range(3)]
    stacked = step.permute("stacked", step("stack", is_op("relax.reshape")(qkv, wildcard())))
    layer = [_layer(step, stacked, i) for i in range(3)]
    query, value = (step.permute(f"head{i}", third[i]) | layer[i] for i in (0, 2))
    turned = step.permute("turned_third", third[1]) | step.permute("turned_layer", layer[1])
    return [query, turned, value], [third[i] | step.permute(f"token{i}", layer[i]) for i in range(3)]


def _layer(step: _Steps, stacked: DFPattern, index: int) -> DFPattern:
    """One of the three that are stacked, in the ways in which importing writes that."""
    taken = step(f"take{index}", is_op("relax.take")(stacked, step(f"index{index}", is_const())))
    split = is_tuple_get_item(step("layers", is_op("relax.split")(stacked)), index)
    return taken | is_op("relax.squeeze")(step.slice(f"slice{index}", stacked) | split)


def _read(parts: Parts) -> Reading | None:
    if len(extents(parts["x"])) != 4 or not (_moves_as_expected(parts) and _apart_as_expected(parts)):
        return None
    (n, channels, _, _), (rows, columns) = extents(parts["x"]), _grid(parts)
    batch, tokens, heads, width = _heads(parts)
    sampling, recovery = _sampling(parts), _recovery(parts)
    scale = _scale(parts, width)
    whole_images = (batch, tokens, heads * width) == (n, rows * columns, channels)
    qkv, projection = _linear_bias(parts, "qkv", 3 * channels), _linear_bias(parts, "pr", channels)
    if not whole_images or sampling is None or recovery is None or scale is None or qkv is None or projection is None:
        return None
    weights = {
        "ln_g": array(parts["ln_g"]),
        "ln_b": array(parts["ln_b"]),
        **sampling,
        "qkv_w": array(parts["qkv_w"]),
        "qkv_b": qkv,
        "pr_w": array(parts["pr_w"]),
        "pr_b": projection,
        **recovery,
    }
    attrs = {
        "heads": heads,
        "r": _rate(parts),
        "eps": float(parts["norm"].attrs.epsilon),
        "scale": scale,
    }
    return reading("saa", {"x": parts["x"]}, weights, extents(parts["x"]), attrs)


def _rate(parts: Parts) -> int:
    return int(parts["up"].attrs.strides[0]) if "up" in parts else 1


def _grid(parts: Parts) -> tuple[int, int]:
    """How many windows lie below and beside each other."""
    _, _, h, w = extents(parts["x"])
    return -(-h // _rate(parts)), -(-w // _rate(parts))


def _linear_bias(parts: Parts, name: str, channels: int) -> np.ndarray | None:
    """What a linear layer adds to each of its outputs, or None where it adds something else."""
    if f"{name}_b" not in parts:
        return np.zeros(channels, "float32")
    return per_channel(parts[f"{name}_b"], channels, rank=len(extents(parts[f"{name}_product"])), axis=-1)


def _scale(parts: Parts, width: int) -> float | None:
    """What all factors come to, wherever they are; None when one of them is not a number."""
    if "whole" in parts:
        attrs = parts["whole"].attrs
        plain = attrs.causal_mask is None and attrs.window_size is None
        return (width**-0.5 if attrs.scale is None else float(attrs.scale)) if plain else None
    factors = [array(parts[name]) for name in ("query_scale", "key_scale", "scale") if name in parts]
    return math.prod((each.item() for each in factors), start=1.0) if all(each.size == 1 for each in factors) else None


def _sampling(parts: Parts) -> dict[str, np.ndarray] | None:
    """Weights of the saliency, or None where windows are not sampled as the kernel does it."""
    if "up" not in parts:
        return {}
    _, channels, _, _ = extents(parts["x"])
    rate, grid = _rate(parts), _grid(parts)
    nothing, equal = np.zeros((3, 3, channels), "float32"), np.zeros(1, "float32")
    first = np.full((rate, rate), NO_SHARE, "float32")
    first[0, 0] = 0.0
    if "sal_w" in parts:
        sampled = {"sal_w": array(parts["sal_w"])[0].transpose(1, 2, 0), "sal_b": equal}
        return sampled if _weighs_windows(parts, rate, grid) else None
    if "pool" in parts:
        attrs = parts["pool"].attrs
        size = {int(extent) for extent in attrs.pool_size}
        regular = list(attrs.strides) == [rate, rate] and not any(attrs.padding) and set(attrs.dilation) == {1}
        fits = regular and extents(parts["pool"])[2:] == grid and size <= {1, rate} and len(size) == 1
        return {"sal_w": nothing, "sal_b": first if size == {1} else equal} if fits else None
    every = _slice(parts["every"])
    fits = every == {1: (0, rate), 2: (0, rate)} and extents(parts["every"])[1:3] == grid
    return {"sal_w": nothing, "sal_b": first} if fits else None


def _weighs_windows(parts: Parts, rate: int, grid: tuple[int, int]) -> bool:
    conv = parts["saliency"].attrs
    (rows, columns), (_, channels, h, w) = grid, extents(parts["x"])
    split = (rows, rate, columns, rate)
    widths = [0, 0, 0, rows * rate - h, 0, columns * rate - w, 0, 0]
    return (
        extents(parts["sal_w"]) == (1, channels, 3, 3)
        and list(conv.padding) == [1, 1, 1, 1]
        and list(conv.strides) == list(conv.dilation) == [1, 1]
        and all(extents(parts[f"{name}_windows"].args[0])[1:5] == split for name in ("saliency", "token"))
        and all(_pads(parts, name, widths) for name in ("saliency", "token"))
        and ("saliency_pad" not in parts or float(parts["saliency_pad"].attrs.pad_value) <= NO_SHARE)
        and int(parts["share"].attrs.axis) == 2
        and extents(parts["share"])[1:] == (rows * columns, rate * rate, 1)
        and [int(axis) for axis in parts["sum"].attrs.axis] == [2]
    )


def _pads(parts: Parts, name: str, widths: list[int]) -> bool:
    """Whether the map is filled up below and on the right to whole windows, and nowhere else."""
    if f"{name}_pad" not in parts:
        return not any(widths)
    attrs = parts[f"{name}_pad"].attrs
    return [int(width) for width in attrs.pad_width] == widths and attrs.pad_mode == "constant"


def _recovery(parts: Parts) -> dict[str, np.ndarray] | None:
    """Weights of a depthwise deconvolution whose windows touch and do not overlap, or None for any other."""
    if "up" not in parts:
        return {}
    attrs, rate, (_, channels, _, _) = parts["up"].attrs, _rate(parts), extents(parts["x"])
    fits = (
        rate > 1
        and extents(parts["up_w"]) == (channels, 1, rate, rate)
        and attrs.groups == channels
        and list(attrs.strides) == [rate, rate]
        and not any([*attrs.padding, *attrs.output_padding])
        and extents(parts["to_first"])[2:] == _grid(parts)
        and all(begin == 0 and step == 1 for begin, step in _slice(parts.get("crop")).values())
    )
    weight = array(parts["up_w"])[:, 0].transpose(1, 2, 0)
    offset = per_channel(parts["up_b"], channels) if "up_b" in parts else np.zeros(channels, "float32")
    return {"up_w": weight, "up_b": offset} if fits and offset is not None else None


def _slice(call: Any) -> dict[int, tuple[int, int]]:
    """Of a strided slice, where it begins and how it steps along each axis that it cuts."""
    if call is None:
        return {}
    axes, begins, _, steps = ([int(number) for number in arg] for arg in call.args[1:])
    return {axis: (begin, step) for axis, begin, step in zip(axes, begins, steps, strict=True)}


def _moves_as_expected(parts: Parts) -> bool:
    """Every permute and axis is the one the algebra needs."""
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
        "turned_third": [0, 2, 3, 1],
        "turned_layer": [0, 1, 3, 2],
        "joined": [0, 2, 1, 3],
        **{f"{kind}{i}": [0, 2, 1, 3] for kind in ("head", "token") for i in range(3)},
    }
    return (
        all(_axes(parts[name]) == order for name, order in axes.items() if name in parts)
        and [int(axis) % 4 for axis in parts["norm"].attrs.axes] == [3]
        and ("attention" not in parts or _along_last(parts["attention"], parts["attention"].attrs.axis))
        and ("infinity" not in parts or bool(np.all(array(parts["infinity"]) == -math.inf)))
        and extents(parts["spread"]) == extents(parts["x"])
    )


def _axes(call: Any) -> list[int]:
    return [int(axis) for axis in call.attrs.axes]


def _along_last(call: Any, axis: int) -> bool:
    return int(axis) in (-1, len(extents(call)) - 1)


def _heads(parts: Parts) -> tuple[int, int, int, int]:
    """What attends to each other: how many groups of how many tokens, in how many heads of what width."""
    shape = extents(parts["third0"] if "third0" in parts else parts["stack"])
    return (shape[0], shape[1], shape[-2], shape[-1]) if len(shape) in (4, 5) else (0, 0, 0, 0)


def _apart_as_expected(parts: Parts) -> bool:
    """Query, key and value come in this order, and have the same size."""
    if "thirds" in parts:
        call, channels = parts["thirds"], extents(parts["x"])[1]
        total = extents(call.args[0])[-1]
        return total == 3 * channels and _in_three(call, total) and _along_last(call.args[0], call.attrs.axis)
    if len(extents(parts["stack"])) != 5 or extents(parts["stack"])[2] != 3:
        return False
    return all(_is_layer(parts, index) for index in range(3))


def _is_layer(parts: Parts, index: int) -> bool:
    if f"take{index}" in parts:
        return int(array(parts[f"index{index}"])) == index and int(parts[f"take{index}"].attrs.axis) == 0
    if f"slice{index}" in parts:
        whole = extents(parts[f"slice{index}"])[0] == 1
        return whole and _slice(parts[f"slice{index}"]) == {0: (index, 1)}
    return _in_three(parts["layers"], 3) and int(parts["layers"].attrs.axis) == 0


def _in_three(split: Any, total: int) -> bool:
    sections = split.attrs.indices_or_sections
    if isinstance(sections, int) or not hasattr(sections, "__iter__"):
        return int(sections) == 3
    return [int(at) for at in sections] == [total // 3, 2 * (total // 3)]
