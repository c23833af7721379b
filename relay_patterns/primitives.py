"""Operators that are kernels by themselves, whoever's model they are in, with all that follows them in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from relay_patterns.attention import attention
from relay_patterns.epilogue import Chain, chains
from relay_patterns.graph import Graph
from relay_patterns.region import Reading, array, extents, reading

Weights = dict[str, np.ndarray]


def conv(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """A convolution, dense or depthwise; any kernel, strides, padding and dilation."""
    call = _of(graph, var, "relax.nn.conv2d")
    if call is None or not _constant(call.args[1]) or not isinstance(call.args[0], relax.Var):
        return
    attrs, (channels, within, _, _) = call.attrs, extents(call.args[1])
    if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "OIHW"):
        return
    depthwise = within == 1 and attrs.groups == channels == extents(call.args[0])[1] > 1
    weight = array(call.args[1])
    weight = weight[:, 0].transpose(1, 2, 0) if depthwise else weight.transpose(2, 3, 1, 0)
    how: dict[str, Any] = {name: _numbers(getattr(attrs, name)) for name in ("strides", "padding", "dilation")}
    if not depthwise:
        how |= {"groups": int(attrs.groups), "exact": _is_whole(weight)}
    beside = call.args[0] if depthwise else None
    for chain in chains(graph, var, channels, axis=1, folds=_folds(weight), beside=beside):
        op, own = "depthwise" if depthwise else "conv", {"w": weight * chain.factor}
        yield chain.result, _with(chain, op, call.args[0], own, extents(chain.result), how)


def _is_whole(weight: np.ndarray) -> bool:
    """Numbers of a quantized model: sums of whole numbers are exact while they are short, and decide what is stored."""
    first = weight[:1]  # nearly always this says no
    return bool((first == np.rint(first)).all() and (weight == np.rint(weight)).all() and np.abs(weight).max() > 1)


def _folds(weight: np.ndarray) -> tuple[str, ...]:
    return () if _is_whole(weight) else ("scale",)


def linear(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """A product with a matrix of weights, of one row or of many tokens."""
    call = _of(graph, var, "relax.matmul")
    if call is None or not _constant(call.args[1]) or not isinstance(call.args[0], relax.Var):
        return
    weight, rank = array(call.args[1]), len(extents(var))
    if weight.ndim != 2 or rank < 2:
        return
    for chain in chains(graph, var, weight.shape[1], axis=-1, folds=_folds(weight)):
        own = {"w": weight * chain.factor}
        yield chain.result, _with(chain, "linear", call.args[0], own, extents(var), {}, layout="")


def matmul(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """A product for every item of a batch, where neither factor is a weight."""
    call = _of(graph, var, "relax.matmul")
    if call is None or not all(isinstance(factor, relax.Var) for factor in call.args):
        return
    left, right = map(extents, call.args)
    if len(left) < 2 or left[:-2] != right[:-2]:
        return
    for chain in chains(graph, var, right[-1], axis=-1):
        inputs = {"x": call.args[0], "y": call.args[1], **chain.operands}
        yield chain.result, reading("matmul", inputs, chain.weights, extents(var), {}, chain.steps, layout="")


def layer_norm(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """Over the last axis, with a gain and an offset."""
    call = _of(graph, var, "relax.nn.layer_norm")
    if call is None or not all(map(_constant, call.args[1:])) or not isinstance(call.args[0], relax.Var):
        return
    attrs, rank = call.attrs, len(extents(var))
    if [int(axis) % rank for axis in attrs.axes] != [rank - 1] or not (attrs.center and attrs.scale):
        return
    yield from _normalised(graph, var, call, "layer_norm", {"eps": float(attrs.epsilon)}, axis=-1, layout="")


def _normalised(
    graph: Graph, var: relax.Var, call: relax.Call, op: str, how: dict[str, Any], axis: int, layout: str
) -> Iterator[tuple[relax.Var, Reading]]:
    """A norm with its gain and its offset, and what follows it: a scale and a bias are taken into these."""
    gain, offset = map(array, call.args[1:])
    for chain in chains(graph, var, len(gain), axis=axis, folds=("scale", "bias")):
        own = {"g": gain * chain.factor, "b": offset * chain.factor + chain.shift}
        named = {"bias" if name == "b" else name: each for name, each in chain.weights.items()}  # `b` is the norm's own
        chain = replace(chain, weights=named)
        yield chain.result, _with(chain, op, call.args[0], own, extents(var), how, layout=layout)


def group_norm(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """Over the positions of an image and groups of its channels, with a gain and an offset by channel."""
    call = _of(graph, var, "relax.nn.group_norm")
    if call is None or not all(map(_constant, call.args[1:])) or not isinstance(call.args[0], relax.Var):
        return
    attrs, rank = call.attrs, len(extents(var))
    axes = sorted(int(axis) % rank for axis in attrs.axes)
    if rank != 4 or int(attrs.channel_axis) != 1 or axes != [2, 3] or not (attrs.center and attrs.scale):
        return
    how = {"eps": float(attrs.epsilon), "groups": int(attrs.num_groups)}
    yield from _normalised(graph, var, call, "group_norm", how, axis=1, layout="NCHW")


def softmax(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """Over the last axis."""
    call = _of(graph, var, "relax.nn.softmax")
    if (
        call is None
        or not isinstance(call.args[0], relax.Var)
        or int(call.attrs.axis) not in (-1, len(extents(var)) - 1)
    ):
        return
    for chain in chains(graph, var, extents(var)[-1], axis=-1):
        yield chain.result, _with(chain, "softmax", call.args[0], {}, extents(var), {}, layout="")


def pool(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """The largest value or the mean of every window."""
    for mode in ("max", "avg"):
        call = _of(graph, var, f"relax.nn.{mode}_pool2d")
        if call is None or call.attrs.layout != "NCHW" or not isinstance(call.args[0], relax.Var):
            continue
        attrs: dict[str, Any] = {
            name: _numbers(getattr(call.attrs, name)) for name in ("strides", "padding", "dilation")
        }
        attrs |= {"mode": mode, "kernel": _numbers(call.attrs.pool_size)}
        if mode == "avg":
            attrs["count_padding"] = bool(call.attrs.count_include_pad)
        if _windows(extents(call.args[0])[2:], attrs) == extents(var)[2:]:
            for chain in chains(graph, var, extents(var)[1], axis=1):
                yield chain.result, _with(chain, "pool", call.args[0], {}, extents(var), attrs)


def _windows(size: tuple[int, ...], attrs: dict[str, Any]) -> tuple[int, ...]:
    """How many whole windows there are below and beside each other; the operator may count others that are cut off."""
    above, left, below, right = attrs["padding"]
    spans = ((kernel - 1) * step + 1 for kernel, step in zip(attrs["kernel"], attrs["dilation"], strict=True))
    whole = zip(size, (above + below, left + right), spans, attrs["strides"], strict=True)
    return tuple((extent + padded - span) // stride + 1 for extent, padded, span, stride in whole)


def mean(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    """The mean of every channel of an image."""
    call = _of(graph, var, "relax.mean")
    if call is None or not isinstance(call.args[0], relax.Var) or len(extents(call.args[0])) != 4:
        return
    if sorted(int(axis) % 4 for axis in call.attrs.axis) != [2, 3]:
        return
    if call.attrs.keepdims:  # in the form of an image, where nothing that follows is taken
        whole = extents(var)
        found = reading("mean", {"x": call.args[0]}, {}, whole[:2])
        yield var, found._replace(result=lambda out: relax.op.reshape(out, whole))
        return
    for chain in chains(graph, var, extents(var)[1], axis=1):
        yield chain.result, _with(chain, "mean", call.args[0], {}, extents(var), {})


# Readings of one primitive, the one that does most first.
PRIMITIVES: tuple[Callable[[Graph, relax.Var], Iterator[tuple[relax.Var, Reading]]], ...] = (
    *(attention, conv, linear, matmul),
    *(layer_norm, group_norm, softmax, pool, mean),
)


def _with(
    chain: Chain, op: str, x: relax.Expr, own: Weights, out: tuple[int, ...], attrs: Any, layout: str = "NCHW"
) -> Reading:
    """A primitive that has weights of its own, with what follows it."""
    return reading(op, {"x": x, **chain.operands}, {**own, **chain.weights}, out, attrs, chain.steps, layout)


def _of(graph: Graph, var: relax.Var, op: str) -> relax.Call | None:
    call = graph.call(var)
    return call if call is not None and call.op == tvm.ir.Op.get(op) else None


def _constant(expr: relax.Expr) -> bool:
    return isinstance(expr, tvm.ir.GenericConst)


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
