"""CIFFN as launches: two 1x1 convolutions with a depthwise one between them, and the sum that all channels share.

The redistribution z + g (z - s) folds into the projection: z @ (1 + g) W - s (g @ W), a rank-one term.
"""

from __future__ import annotations

from schedules.dtypes import stored_as
from schedules.gpu.epilogue import BIAS_GELU, BIAS_RESIDUAL
from schedules.gpu.fused.saa_plan import BATCH
from schedules.gpu.launch import Launch, Limits, Weights
from schedules.gpu.primitives.depthwise import Depthwise
from schedules.gpu.primitives.reduce import CommonPart
from schedules.gpu.primitives.tensor_conv import convolution
from schedules.spec import KernelSpec


def launches(spec: KernelSpec, limits: Limits, dtype: str, _given: str) -> list[Launch]:
    """For few images on NVIDIA's GPUs the projection also sums s up, anew in every work-group.

    Arithmetic is no matter there, and launches are. A phone would notice: s is an eighth to a quarter more to compute.
    """
    n, h, w, c = spec.x.axes("NHWC")
    (e,), stored = spec.weight("ex_b").shape, stored_as(dtype)
    images = {"n": n, "h": h, "w": w, "dtype": dtype, "given": stored}
    expand = convolution(limits, c=c, k=e, **images)
    merged = n < BATCH and bool(limits.tensor_cores)
    project = convolution(limits, c=e, k=c, epilogue=BIAS_RESIDUAL, rank_one=True, common=merged, **images)
    depthwise = Depthwise(n, e, h, w, padding=(1, 1, 1, 1), epilogue=BIAS_GELU, dtype=stored)
    common = ["dec_w", "dec_b"] if merged else ["common"]
    found = [
        Launch(expand, ("x", "ex_w", "ex_b"), "wide"),
        Launch(depthwise, ("wide", "dw_w", "dw_b"), "hidden"),
    ]
    if not merged:
        found.append(Launch(CommonPart(n, e, h, w, stored), ("hidden", "dec_w", "dec_b"), "common"))
    return [*found, Launch(project, ("hidden", "pr_w", "pr_b", *common, "gained", "x"), "out")]


def constants(_spec: KernelSpec, weights: Weights) -> Weights:
    gain, matrix = weights["g"].astype("float64"), weights["pr_w"].astype("float64")
    return {**weights, "pr_w": (1 + gain)[:, None] * matrix, "gained": gain @ matrix}
