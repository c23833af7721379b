"""Models trained to be quantized: what a number would be after it was stored in few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _whole(x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """The number, and whether it is within the bounds."""
    steps = torch.round(x * (1 / scale)) + zero_point
    within = (steps >= quant_min) & (steps <= quant_max)
    return (steps.clamp(quant_min, quant_max) - zero_point) * scale, within


def _by_channel(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, *bounds: int) -> tuple[Tensor, Tensor]:
    shape = [-1 if each == axis else 1 for each in range(x.dim())]
    return _whole(x, scale.reshape(shape), zero_point.to(x.dtype).reshape(shape), *bounds)


def _by_tensor(x: Tensor, scale: Tensor, zero_point: Tensor, enabled: Tensor, *bounds: int) -> tuple[Tensor, Tensor]:
    found, within = _whole(x, scale, zero_point.to(x.dtype), *bounds)
    return torch.where(enabled > 0, found, x), within


REWRITES = {
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default": _by_tensor,
    "fake_quantize_per_channel_affine_cachemask.default": _by_channel,
    "fake_quantize_per_tensor_affine_cachemask.default": _whole,
}
