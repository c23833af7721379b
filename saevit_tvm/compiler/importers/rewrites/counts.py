"""How often numbers occur."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saevit_tvm.compiler.importers.rewrites.places import AT_ONCE


def _most_frequent(x: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
    """The smallest of those that are, and where it stands last."""
    if not x.dim() or not x.dtype.is_floating_point or x.numel() * x.shape[dim] > AT_ONCE:
        return NotImplemented
    line = x.movedim(dim, -1)
    count = (line.unsqueeze(-1) == line.unsqueeze(-2)).sum(-1)
    value = torch.where(count == count.amax(-1, keepdim=True), line, math.inf).amin(-1, keepdim=True)
    place = torch.where(line == value, torch.arange(line.shape[-1]), -1).amax(-1, keepdim=True)
    found = (each.movedim(-1, dim) for each in (value, place))
    return tuple(each if keepdim else each.squeeze(dim) for each in found)


def _histogram(x: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    """The last part has its upper bound; what lies outside of all, or is no number, is not counted."""
    if not x.dtype.is_floating_point or x.numel() * bins > AT_ONCE:
        return NotImplemented
    if min == max == 0:
        low, high = x.amin(), x.amax()
        is_one = low == high
        low, high = torch.where(is_one, low - 1, low), torch.where(is_one, high + 1, high)
        bounds = low + (high - low) * (torch.arange(bins + 1) / bins)
        bounds = torch.cat((bounds[:-1], high.reshape(1)))
    else:
        bounds = torch.linspace(min, max, bins + 1)
    x, bounds = x.reshape(1, -1), bounds.unsqueeze(-1)
    is_last = (torch.arange(bins) == bins - 1).unsqueeze(-1)
    within = (x >= bounds[:-1]) & ((x < bounds[1:]) | (is_last & (x == bounds[1:])))
    return within.sum(-1).to(x.dtype)


REWRITES = {"histc.default": _histogram, "mode.default": _most_frequent}
