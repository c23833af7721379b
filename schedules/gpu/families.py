"""Every kind of GPU kernel, by the name that its declarations carry."""

from __future__ import annotations

from schedules.gpu.cast import Cast
from schedules.gpu.conv import Conv
from schedules.gpu.depthwise import Depthwise
from schedules.gpu.head import Head
from schedules.gpu.launch import Kernel
from schedules.gpu.reduce import CommonPart
from schedules.gpu.saa import Attend, Recover, Sample
from schedules.gpu.saa_batch import BatchSample, Mix, Normalise, Spread
from schedules.gpu.tensor import TensorConv

PREFIX = "gpu."
KERNELS: dict[str, type[Kernel]] = {
    PREFIX + kernel.NAME: kernel
    for kernel in (
        *(Conv, TensorConv, Depthwise, CommonPart, Head, Cast),
        *(Sample, Attend, Recover),
        *(BatchSample, Normalise, Mix, Spread),
    )
}
