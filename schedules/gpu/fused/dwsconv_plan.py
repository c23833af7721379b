"""DWSConv as launches: depthwise 3x3 with GELU, then the 1x1 convolution, which adds the residual."""

from __future__ import annotations

from schedules.dtypes import stored_as
from schedules.gpu.epilogue import BIAS_GELU, BIAS_RESIDUAL
from schedules.gpu.launch import Launch, Limits
from schedules.gpu.primitives.depthwise import Depthwise
from schedules.gpu.primitives.tensor_conv import convolution
from schedules.spec import KernelSpec


def launches(spec: KernelSpec, limits: Limits, dtype: str, _given: str) -> list[Launch]:
    n, h, w, c = spec.x.axes("NHWC")
    stored = stored_as(dtype)
    depthwise = Depthwise(n, c, h, w, padding=(1, 1, 1, 1), epilogue=BIAS_GELU, dtype=stored)
    pointwise = convolution(limits, n=n, h=h, w=w, c=c, k=c, epilogue=BIAS_RESIDUAL, dtype=dtype, given=stored)
    return [
        Launch(depthwise, ("x", "dw_w", "dw_b"), "hidden"),
        Launch(pointwise, ("hidden", "pw_w", "pw_b", "x"), "out"),
    ]
