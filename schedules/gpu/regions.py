"""Regions as launches: which kernels a region of the graph becomes on a GPU, and with which constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from schedules.gpu.conv import ConvShape, conv
from schedules.gpu.depthwise import depthwise
from schedules.gpu.launch import Limits, Lowered
from schedules.gpu.reduce import PARTS, SIDE, common_part
from schedules.gpu.saa import SAAShape, saa

Shape = Mapping[str, Any]
Weights = Mapping[str, np.ndarray]


def lower(region: str, shape: Shape, weights: Weights, limits: Limits) -> Lowered | None:
    """The launches of a region, or None where there are none for this shape or device."""
    if limits.work_group < max(limits.wave, SIDE * PARTS):
        return None
    if region == "saa":
        return saa(SAAShape(**shape), dict(weights), limits)
    if region == "ciffn":
        return _ciffn(shape, weights, limits)
    if region == "dwsconv":
        return _dwsconv(shape, weights, limits)
    if region == "conv":
        return _conv(ConvShape(**shape), weights, limits)
    return None


def _conv(shape: ConvShape, weights: Weights, limits: Limits) -> Lowered:
    weight = weights["w"].reshape(shape.c, shape.k) if shape.kernel == 1 else weights["w"]
    return Lowered([conv(shape, limits)], _floats({"w_w": weight, "w_b": weights["b"]}))


def _dwsconv(shape: Shape, weights: Weights, limits: Limits) -> Lowered:
    n, h, w, c = (shape[name] for name in "nhwc")
    launches = [
        depthwise(n, c, h, w, limits, x="x", out="hidden"),
        conv(ConvShape(n, h, w, c, c), limits, x="hidden", weights="pw", residual="x"),
    ]
    return Lowered(launches, _floats(weights))


def _ciffn(shape: Shape, weights: Weights, limits: Limits) -> Lowered:
    """The redistribution z + g (z - s) folds into the projection: z @ (1 + g) W - s (g @ W), a rank-one term."""
    n, h, w, c, e = (shape[name] for name in "nhwce")
    narrow = ConvShape(n, h, w, e, c)
    launches = [
        conv(replace(narrow, c=c, k=e), limits, x="x", weights="ex", out="wide"),
        depthwise(n, e, h, w, limits, x="wide", out="hidden"),
        common_part(n, e, h, w, limits, x="hidden", out="common"),
        conv(narrow, limits, x="hidden", weights="pr", residual="x", rank_one=("common", "gained")),
    ]
    gain, project = weights["g"].astype("float64"), weights["pr_w"].astype("float64")
    constants = {name: value for name, value in weights.items() if name != "g"}
    constants |= {"pr_w": (1 + gain)[:, None] * project, "gained": gain @ project}
    return Lowered(launches, _floats(constants))


def _floats(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(value, "float32") for name, value in values.items()}
