"""Sums, means and lengths."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saevit_tvm.compiler.importers.rewrites.places import AT_ONCE


def _distances(a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Tensor:
    apart = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).sum(-1).to(a.dtype)
    if p == 1:
        return apart.sum(-1)
    if p == 2:
        return (apart * apart).sum(-1).sqrt()
    return apart.amax(-1) if p == math.inf else (apart**p).sum(-1) ** (1 / p)


def _length(x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if x.is_complex():
        return torch.linalg.vector_norm(x.abs(), ord, dim, keepdim)
    if ord not in (0, 2):
        return NotImplemented
    axes = list(range(x.dim())) if dim is None else dim
    x = x if dtype is None else x.to(dtype)
    return (x * x).sum(axes, keepdim).sqrt() if ord else (x != 0).sum(axes, keepdim).to(x.dtype)


def _variance_and_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    axes = dim or list(range(x.dim()))
    return torch.var(x, axes, correction=1 if correction is None else correction, keepdim=keepdim), x.mean(
        axes, keepdim
    )


def _means(
    x: Tensor,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Of windows, by another number than how many numbers they have; what lies outside of the picture is zero."""
    if divisor_override is None:
        return NotImplemented
    kernel, padding = _pair(kernel_size), _pair(padding)
    stride, pads = _pair(stride or kernel), []
    for length, size, step, pad in zip(x.shape[-2:], kernel, stride, padding, strict=True):
        reach = length + 2 * pad - size
        count = (-(-reach // step) if ceil_mode else reach // step) + 1
        count -= (count - 1) * step >= length + pad  # no window begins behind the picture
        pads.append((pad, max(0, (count - 1) * step + size - length - pad)))
    padded = torch.nn.functional.pad(x, (*pads[1], *pads[0]))
    return torch.nn.functional.avg_pool2d(padded, kernel, stride) * (kernel[0] * kernel[1] / divisor_override)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else [*value, *value][:2]


def _bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found = torch.einsum("...i,oij,...j->...o", a, weight, b)
    return found if bias is None else found + bias


def _whole_product(a: Tensor, b: Tensor) -> Any:
    """Of whole numbers, which TVM's rule multiplies as fractions."""
    if a.dtype.is_floating_point or a.dtype.is_complex or a.numel() * b.shape[-1] > AT_ONCE:
        return NotImplemented
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2).to(a.dtype)


REWRITES = {
    "_cdist_forward.default": _distances,
    "any.default": lambda x: x.reshape(-1).any(0),
    "avg_pool2d.default": _means,
    "bilinear.default": _bilinear,
    "bmm.default": _whole_product,
    "linalg_vector_norm.default": _length,
    "mm.default": _whole_product,
    "var_mean.correction": _variance_and_mean,
}
