"""What has come so far along an axis, and the number of a rank."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

LONGEST = 4096  # numbers: work grows with the square


def _so_far(x: Tensor, dim: int, rest: float) -> tuple[Tensor, Tensor]:
    """Every number beside all numbers up to it, on a new last axis, and which these are."""
    x = x.movedim(dim, -1)
    upto = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool).tril()
    return torch.where(upto, x.unsqueeze(-2), torch.full((), rest, dtype=x.dtype)), upto


def _extreme(largest: bool, x: Tensor, dim: int) -> Any:
    if not x.dim() or not x.dtype.is_floating_point or x.shape[dim] > LONGEST:
        return NotImplemented
    numbers, upto = _so_far(x, dim, -math.inf if largest else math.inf)
    value = numbers.amax(-1) if largest else numbers.amin(-1)
    there = upto & (numbers == value.unsqueeze(-1))
    places = torch.where(there, torch.arange(numbers.shape[-1]), torch.zeros((), dtype=torch.int64))
    return value.movedim(-1, dim), places.amax(-1).movedim(-1, dim)  # of equal ones the last


def _log_sum(x: Tensor, dim: int) -> Any:
    if not x.dim() or not x.dtype.is_floating_point or x.shape[dim] > LONGEST:
        return NotImplemented
    return _so_far(x, dim, -math.inf)[0].logsumexp(-1).movedim(-1, dim)


def _of_rank(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    if not x.dim():
        return NotImplemented
    found = (each.narrow(dim, k - 1, 1) for each in torch.topk(x, k, dim, largest=False))
    return tuple(each if keepdim else each.squeeze(dim) for each in found)


REWRITES = {
    "cummax.default": partial(_extreme, True),
    "cummin.default": partial(_extreme, False),
    "kthvalue.default": _of_rank,
    "logcumsumexp.default": _log_sum,
}
