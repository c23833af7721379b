"""Regions as launches: which kernels a region of the graph becomes on a GPU, and with which constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from schedules.dtypes import stored_as
from schedules.gpu.depthwise import Depthwise
from schedules.gpu.head import Head
from schedules.gpu.launch import Launch, Launches, Limits
from schedules.gpu.reduce import CommonPart
from schedules.gpu.saa import SAA
from schedules.gpu.saa_region import BATCH, saa
from schedules.gpu.tensor import convolution

Shape = Mapping[str, Any]
Weights = Mapping[str, np.ndarray]


def lower(
    region: str, shape: Shape, weights: Weights, limits: Limits, dtype: str = "float32", given: str | None = None
) -> Launches | None:
    """The launches of a region, or None where there are none for this shape or device.

    Convolutions compute in `dtype`, and images and matrices of weights are stored as it is; the input of a
    convolution may come in another way, `given`.
    """
    lowered = _launches(region, dict(shape), weights, limits, dtype, given or stored_as(dtype))
    if lowered is None or any(launch.kernel.default(limits) is None for launch in lowered.launches):
        return None
    return Launches(lowered.launches, _stored(lowered))


def _launches(
    region: str, shape: dict[str, Any], weights: Weights, limits: Limits, dtype: str, given: str
) -> Launches | None:
    if region == "saa":
        return saa(limits, SAA(**shape, dtype=stored_as(dtype)), dict(weights), dtype)
    if region == "ciffn":
        return _ciffn(shape, weights, limits, dtype)
    if region == "dwsconv":
        return _dwsconv(shape, weights, limits, dtype)
    if region == "conv":
        kernel = convolution(limits, **shape, dtype=dtype, given=given)
        return Launches([Launch(kernel, ("x", "w", "b"), "out")], dict(weights))
    if region == "head":
        return Launches([Launch(Head(**shape, dtype=stored_as(dtype)), ("x", "w", "b"), "out")], dict(weights))
    return None


def _dwsconv(shape: Shape, weights: Weights, limits: Limits, dtype: str) -> Launches:
    n, h, w, c = (shape[name] for name in "nhwc")
    stored = stored_as(dtype)
    pointwise = convolution(limits, n=n, h=h, w=w, c=c, k=c, residual=True, dtype=dtype, given=stored)
    launches = [
        Launch(Depthwise(n, c, h, w, stored), ("x", "dw_w", "dw_b"), "hidden"),
        Launch(pointwise, ("hidden", "pw_w", "pw_b", "x"), "out"),
    ]
    return Launches(launches, dict(weights))


def _ciffn(shape: Shape, weights: Weights, limits: Limits, dtype: str) -> Launches:
    """The redistribution z + g (z - s) folds into the projection: z @ (1 + g) W - s (g @ W), a rank-one term.

    For few images on NVIDIA's GPUs the projection also sums s up, anew in every work-group: arithmetic is no matter
    there, and launches are. A phone would notice: s is an eighth to a quarter more to compute.
    """
    n, h, w, c, e = (shape[name] for name in "nhwce")
    stored = stored_as(dtype)
    images = {"n": n, "h": h, "w": w, "dtype": dtype, "given": stored}
    expand = convolution(limits, c=c, k=e, **images)
    merged = n < BATCH and bool(limits.tensor_cores)
    project = convolution(limits, c=e, k=c, residual=True, rank_one=True, common=merged, **images)
    launches = [
        Launch(expand, ("x", "ex_w", "ex_b"), "wide"),
        Launch(Depthwise(n, e, h, w, stored), ("wide", "dw_w", "dw_b"), "hidden"),
    ]
    common = ["dec_w", "dec_b"] if merged else ["common"]
    if not merged:
        launches.append(Launch(CommonPart(n, e, h, w, stored), ("hidden", "dec_w", "dec_b"), "common"))
    launches.append(Launch(project, ("hidden", "pr_w", "pr_b", *common, "gained", "x"), "out"))
    gain, matrix = weights["g"].astype("float64"), weights["pr_w"].astype("float64")
    constants = {name: value for name, value in weights.items() if name != "g"}
    constants |= {"pr_w": (1 + gain)[:, None] * matrix, "gained": gain @ matrix}
    return Launches(launches, constants)


def _stored(lowered: Launches) -> dict[str, np.ndarray]:
    """The constants as the kernels that read them want them."""
    found = {}
    for launch in lowered.launches:
        for name, buffer in zip(launch.reads, launch.kernel.reads.values(), strict=True):
            if name in lowered.constants:
                found[name] = np.ascontiguousarray(lowered.constants[name], buffer.dtype).reshape(buffer.extents)
    return found
