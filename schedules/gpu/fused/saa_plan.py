"""SAA as launches: one form for few images and one for batches, with the constants that each wants."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from schedules.dtypes import stored_as
from schedules.gpu.epilogue import BIAS_RESIDUAL
from schedules.gpu.fused.saa import SAA, Attend, Recover, Sample
from schedules.gpu.fused.saa_batch import BatchSample, Mix, Normalise, Spread
from schedules.gpu.launch import Launch, Limits, Weights
from schedules.gpu.primitives.tensor_conv import convolution
from schedules.saa_shape import TAPS
from schedules.spec import FLOAT, KernelSpec

# Images from which on the form for batches is taken, by an estimate: it is two launches more, some microseconds.
# Without it the weights of qkv and of the projection are read again for every token of every image: in saevit_xs and
# float16 that is 160 MB an image, more than twice what the form for batches loads for four.
BATCH = 4


def launches(spec: KernelSpec, limits: Limits, dtype: str, _given: str) -> list[Launch] | None:
    """None where heads do not divide the channels. A batch's matrices are multiplied in `dtype`."""
    shape = _shape(spec, dtype)
    if shape.c % shape.heads:
        return None
    return _few(shape) if shape.n < BATCH else _batch(limits, shape, dtype)


def constants(spec: KernelSpec, weights: Weights) -> Weights:
    """The affine part of the layer norm goes into what reads it, the scale of the scores into the query."""
    shape = _shape(spec)
    wide = {name: weight.astype("float64") for name, weight in weights.items()}
    scales = np.ones(3 * shape.c)
    scales[: shape.c] = shape.scale
    found = {
        "qkv_w": wide["ln_g"][:, None] * wide["qkv_w"] * scales,
        "qkv_b": (wide["ln_b"] @ wide["qkv_w"] + wide["qkv_b"]) * scales,
        "pr_w": wide["pr_w"],
        "pr_b": wide["pr_b"],
    }
    if shape.r > 1:
        taps = wide["sal_w"].reshape(TAPS, shape.c)
        in_window = np.broadcast_to(wide["sal_b"], (shape.r, shape.r)).reshape(-1)
        found |= {"sal_w": taps * wide["ln_g"], "sal_b": taps @ wide["ln_b"], "in_window": in_window}
        spread = wide["up_w"] if shape.n < BATCH else wide["up_w"].transpose(2, 0, 1)
        found |= {"up_w": spread, "up_b": wide["up_b"]}
    return found


def _shape(spec: KernelSpec, dtype: str = FLOAT) -> SAA:
    n, h, w, c = spec.x.axes("NHWC")
    return SAA(n, h, w, c, spec["heads"], spec["r"], spec["eps"], spec["scale"], stored_as(dtype))


def _few(shape: SAA) -> list[Launch]:
    fields = asdict(shape)
    tokens, found = "x", []
    if shape.r > 1:
        tokens, sample = "tokens", Sample(**fields)
        found.append(Launch(sample, tuple(sample.reads), tokens))
    recover = Recover(**fields)
    return [
        *found,
        Launch(Attend(**fields), (tokens, "qkv_w", "qkv_b"), "mixed"),
        Launch(recover, tuple(recover.reads), "out"),
    ]


def _batch(limits: Limits, shape: SAA, dtype: str) -> list[Launch]:
    fields, n, tokens = asdict(shape), shape.n, shape.tokens
    stored = {"c": shape.c, "dtype": dtype, "given": shape.dtype}
    first = BatchSample(**fields) if shape.r > 1 else Normalise(**fields)
    qkv = convolution(limits, n=1, h=1, w=n * tokens, k=3 * shape.c, **stored)
    found = [
        Launch(first, tuple(first.reads), "tokens"),
        Launch(qkv, ("tokens", "qkv_w", "qkv_b"), "qkv"),
        Launch(Mix(**fields), ("qkv",), "mixed"),
    ]
    if shape.r == 1:
        projection = convolution(limits, n=n, h=shape.h, w=shape.w, k=shape.c, epilogue=BIAS_RESIDUAL, **stored)
        return [*found, Launch(projection, ("mixed", "pr_w", "pr_b", "x"), "out")]
    projection = convolution(limits, n=1, h=1, w=n * tokens, k=shape.c, **stored)
    return [
        *found,
        Launch(projection, ("mixed", "pr_w", "pr_b"), "whole"),
        Launch(Spread(**fields), ("x", "whole", "up_w", "up_b"), "out"),
    ]
