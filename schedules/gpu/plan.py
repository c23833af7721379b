"""From a spec of the graph to launches: which kernels it becomes on a GPU, and with which constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from schedules.activations import ACTIVATIONS
from schedules.discovery import modules
from schedules.dtypes import stored_as
from schedules.gpu import fused
from schedules.gpu.epilogue import PLANE
from schedules.gpu.launch import Launch, Launches, Limits, Weights
from schedules.gpu.primitives.attention import Attention
from schedules.gpu.primitives.depthwise import MOST_TAPS, Depthwise
from schedules.gpu.primitives.head import Head
from schedules.gpu.primitives.norm import GroupNorm, LayerNorm
from schedules.gpu.primitives.pool import Mean, Pool
from schedules.gpu.primitives.softmax import Softmax
from schedules.gpu.primitives.tensor_conv import convolution
from schedules.gpu.primitives.tensor_linear import linear
from schedules.spec import BY_CHANNEL, FLOAT, Epilogue, KernelSpec

MOST_ITEMS = 65535  # work-groups along a third axis, on NVIDIA's
OPERANDS = {"add": "residual", "multiply": "gate"}  # what kernels call the other tensors of an epilogue


class Planner(NamedTuple):
    """How an operation becomes launches.

    launches(spec, limits, dtype, given) needs no weights, so that it is cheap to ask whether there are any;
    constants(spec, weights) are then what these launches read.
    """

    launches: Callable[[KernelSpec, Limits, str, str], list[Launch] | None]
    constants: Callable[[KernelSpec, Weights], Weights] = lambda _, weights: weights
    layout: str = "NCHW"  # of the input
    finishes: bool = False  # with an epilogue


def plan(
    spec: KernelSpec, weights: Weights, limits: Limits, dtype: str = FLOAT, given: str | None = None
) -> Launches | None:
    """The launches of a logical spec, or None where there are none for it or the device.

    Kernels compute in `dtype`, and images and matrices of weights are stored as it is. The input comes as `given`,
    where the first kernel can read that: its `reads` say how it wants the input.
    """
    launches = _launches(spec, limits, dtype, given)
    if launches is None:
        return None
    return Launches(launches, _stored(launches, PLANNERS[spec.op].constants(spec, weights)))


def accepts(spec: KernelSpec, limits: Limits) -> bool:
    """Whether there are launches for a spec that fit the device."""
    return _launches(spec, limits, FLOAT) is not None


def _launches(spec: KernelSpec, limits: Limits, dtype: str, given: str | None = None) -> list[Launch] | None:
    if spec.op not in PLANNERS or not _is_logical(spec) or (spec.epilogue.steps and not PLANNERS[spec.op].finishes):
        return None
    stored = stored_as(dtype)
    # An input that is an operand, too, is read in one form.
    given = stored if given is None or spec.x.name in spec.epilogue.operands else given
    launches = PLANNERS[spec.op].launches(spec, limits, dtype, given)
    if launches is None or launches[-1].kernel.out.extents != spec.out.shape:
        return None
    return launches if all(launch.kernel.default(limits) is not None for launch in launches) else None


def _is_logical(spec: KernelSpec) -> bool:
    """As the graph has it: float32, images channels first, and no views."""
    tensors = (*spec.inputs, *spec.weights, *spec.outputs)
    plain = all(each.dtype == FLOAT and each.layout in ("", "NCHW") and not each.strides for each in tensors)
    return plain and spec.x.layout == PLANNERS[spec.op].layout


def _stored(launches: list[Launch], constants: Weights) -> dict[str, np.ndarray]:
    """The constants as the kernels that read them want them."""
    found = {}
    for launch in launches:
        for name, buffer in zip(launch.reads, launch.kernel.reads.values(), strict=True):
            if name in constants:
                found[name] = np.ascontiguousarray(constants[name], buffer.dtype).reshape(buffer.extents)
    return found


def _conv(spec: KernelSpec, limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    n, h, w, c = spec.x.axes("NHWC")
    high, wide, within, k = spec.weight("w").shape
    finish = _finish(spec, planes=True)
    groups = spec["groups"]
    if within * groups != c or k % groups or finish is None:
        return None
    fields = {"n": n, "h": h, "w": w, "c": c, "k": k, "groups": groups, "kernel": (high, wide), **_window(spec)}
    kernel = convolution(limits, **fields, epilogue=finish.epilogue, dtype=dtype, given=given)
    return [Launch(kernel, ("x", "w", *finish.reads), "out")]


def _depthwise(spec: KernelSpec, _limits: Limits, dtype: str, _given: str) -> list[Launch] | None:
    n, c, h, w = spec.x.shape
    high, wide, channels = spec.weight("w").shape
    finish = _finish(spec, planes=True)
    if channels != c or finish is None or high * wide > MOST_TAPS:
        return None
    fields = {"kernel": (high, wide), **_window(spec), "epilogue": finish.epilogue, "dtype": stored_as(dtype)}
    return [Launch(Depthwise(n, c, h, w, **fields), ("x", "w", *finish.reads), "out")]


def _linear(spec: KernelSpec, limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    *tokens, c = spec.x.shape
    within, k = spec.weight("w").shape
    finish = _finish(spec)
    if within != c or finish is None:
        return None
    fields = {"tokens": tuple(tokens), "c": c, "k": k, "epilogue": finish.epilogue, "dtype": dtype, "given": given}
    kernel = linear(limits, **fields)
    return [Launch(kernel, ("x", "w", *finish.reads), "out")]


def _matmul(spec: KernelSpec, limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    x, y = (each.shape for each in spec.inputs[:2])
    finish = _finish(spec)
    if finish is None or x[:-2] != y[:-2] or x[-1] != y[-2] or math.prod(x[:-2]) > MOST_ITEMS:
        return None
    fields = {"tokens": x[:-1], "c": y[-2], "k": y[-1], "epilogue": finish.epilogue, "dtype": dtype, "given": given}
    kernel = linear(limits, **fields, own=True)
    return [Launch(kernel, ("x", "y", *finish.reads), "out")]


def _attention(spec: KernelSpec, _limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    if spec.get("views"):  # which are read by strides
        return None
    shapes, finish = {each.name: each.shape for each in spec.inputs}, _finish(spec)
    (n, t, heads, d), (_, s, _, dv), mask = shapes["q"], shapes["v"], shapes.get("mask", ())
    wanted = {"q": (n, t, heads, d), "k": (n, s, heads, d), "v": (n, s, heads, dv)}
    repeated = not mask or (len(mask) == 4 and all(a in (1, b) for a, b in zip(mask, (n, heads, t, s), strict=True)))
    if finish is None or not repeated or any(shapes[name] != shape for name, shape in wanted.items()):
        return None
    kernel = Attention(n, t, s, heads, d, dv, spec["scale"], mask, finish.epilogue, stored_as(dtype), given)
    return [Launch(kernel, (*wanted, *(["mask"] if mask else []), *finish.reads), "out")]


def _layer_norm(spec: KernelSpec, _limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    *lead, c = spec.x.shape
    finish = _finish(spec, bias="bias")  # its own offset is the weight `b`
    if finish is None or any(each.shape != (c,) for each in spec.weights):
        return None
    kernel = LayerNorm(tuple(lead), c, finish.epilogue, stored_as(dtype), given, eps=spec["eps"])
    return [Launch(kernel, ("x", "g", "b", *finish.reads), "out")]


def _group_norm(spec: KernelSpec, _limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    n, c, h, w = spec.x.shape
    finish, groups = _finish(spec, bias="bias"), spec["groups"]
    if finish is None or c % groups or any(each.shape != (c,) for each in spec.weights):
        return None
    fields = {"eps": spec["eps"], "positions": h * w, "height": h}
    kernel = GroupNorm((n, groups), c // groups * h * w, finish.epilogue, stored_as(dtype), given, **fields)
    return [Launch(kernel, ("x", "g", "b", *finish.reads), "out")]


def _softmax(spec: KernelSpec, _limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    *lead, c = spec.x.shape
    finish = _finish(spec)
    if finish is None:
        return None
    kernel = Softmax(tuple(lead), c, finish.epilogue, stored_as(dtype), given)
    return [Launch(kernel, ("x", *finish.reads), "out")]


def _pool(spec: KernelSpec, _limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    finish = _finish(spec, planes=True)
    if finish is None or spec["mode"] not in ("max", "avg"):
        return None
    fields = {"kernel": spec["kernel"], **_window(spec), "mode": spec["mode"], "count_padding": spec["count_padding"]}
    n, c, h, w = spec.x.shape
    kernel = Pool(n, c, h, w, **fields, epilogue=finish.epilogue, dtype=stored_as(dtype), given=given)
    return [Launch(kernel, ("x", *finish.reads), "out")]


def _mean(spec: KernelSpec, _limits: Limits, dtype: str, given: str) -> list[Launch] | None:
    finish = _finish(spec)
    if finish is None:
        return None
    n, c, h, w = spec.x.shape
    kernel = Mean(n, c, h, w, finish.epilogue, stored_as(dtype), given)
    return [Launch(kernel, ("x", *finish.reads), "out")]


def _window(spec: KernelSpec) -> dict[str, Any]:
    return {name: spec[name] for name in ("strides", "padding", "dilation")}


def _head(spec: KernelSpec, _limits: Limits, dtype: str, _given: str) -> list[Launch] | None:
    n, h, w, c = spec.x.axes("NHWC")
    kernel = Head(n, h, w, c, k=spec.weight("w").shape[1], dtype=stored_as(dtype))
    return [Launch(kernel, ("x", "w", "b"), "out")]


class Finish(NamedTuple):
    """An epilogue as a kernel has it, and the values that it reads, by their names in the spec."""

    epilogue: Epilogue
    reads: tuple[str, ...]


def _finish(spec: KernelSpec, bias: str = "b", planes: bool = False) -> Finish | None:
    """None where a step is unknown, or an operand does not fit: as large as the result, or a plane, if these are known.

    Of two GELUs, CUDA would take the second one's argument for the first one's (see `LANE_BY_LANE`).
    Kernels name their operands in their own way, so that equal kernels are equal whatever the graph calls its values.
    """
    shapes, whole = {each.name: each.shape for each in spec.inputs}, spec.out.shape
    steps: list[str] = []
    operands: list[str] = []
    for step in spec.epilogue.steps:
        word, _, operand = step.partition(" ")
        if not operand and (word in BY_CHANNEL or word in ACTIVATIONS):
            steps.append(word)
            continue
        is_plane = planes and shapes.get(operand) == (*whole[:2], 1, 1) != whole
        if word not in OPERANDS or not (is_plane or shapes.get(operand) == whole):
            return None
        steps.append(f"{word} {PLANE if is_plane else OPERANDS[word]}{len(operands) or ''}")
        operands.append(operand)
    weights = [name for step, name in (("bias", bias), ("scale", "s")) if step in steps]
    if not {*weights} <= {each.name for each in spec.weights} or steps.count("gelu") > 1:
        return None
    return Finish(Epilogue(tuple(steps)), (*weights, *operands))


def _fused() -> Iterator[tuple[str, Planner]]:
    """Of every file BLOCK_plan.py."""
    for module in modules(fused):
        block, plan, _ = module.__name__.rpartition(".")[2].rpartition("_plan")
        if plan:
            yield block, Planner(module.launches, getattr(module, "constants", lambda _, weights: weights))


PLANNERS: Mapping[str, Planner] = {
    **dict(_fused()),
    "conv": Planner(_conv, finishes=True),
    "depthwise": Planner(_depthwise, finishes=True),
    "linear": Planner(_linear, layout="", finishes=True),
    "matmul": Planner(_matmul, layout="", finishes=True),
    "attention": Planner(_attention, layout="", finishes=True),
    "layer_norm": Planner(_layer_norm, layout="", finishes=True),
    "group_norm": Planner(_group_norm, finishes=True),
    "softmax": Planner(_softmax, layout="", finishes=True),
    "pool": Planner(_pool, finishes=True),
    "mean": Planner(_mean, finishes=True),
    "head": Planner(_head),
}
