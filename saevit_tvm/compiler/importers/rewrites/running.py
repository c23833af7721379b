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
    there = upto & ((numbers == value.unsqueeze(-1)) | numbers.isnan())
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


def _median(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    """The lower one of two; of numbers of which some are none, the first of these."""
    if not x.dim() or not x.dtype.is_floating_point:
        return NotImplemented
    _, place = x.kthvalue((x.shape[dim] + 1) // 2, dim, keepdim=True)
    missing = x.isnan()
    place = torch.where(missing.any(dim, keepdim=True), missing.to(torch.int32).argmax(dim, keepdim=True), place)
    return _at(x, place, dim, keepdim)


def _median_of_numbers(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    """Where there is no number at all, none."""
    if not x.dim() or not x.dtype.is_floating_point:
        return NotImplemented
    order = x.argsort(dim)
    count = (~x.isnan()).sum(dim, keepdim=True)
    return _at(x, order.gather(dim, (count - 1).clamp(min=0) // 2), dim, keepdim)


def _at(x: Tensor, place: Tensor, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    found = (x.gather(dim, place), place)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


def _of_all(median: Any, x: Tensor) -> Any:
    found = median(x.reshape(-1), 0)
    return found if found is NotImplemented else found[0]


REWRITES = {
    "cummax.default": partial(_extreme, True),
    "cummin.default": partial(_extreme, False),
    "kthvalue.default": _of_rank,
    "logcumsumexp.default": _log_sum,
    "median.default": partial(_of_all, _median),
    "median.dim": _median,
    "nanmedian.default": partial(_of_all, _median_of_numbers),
    "nanmedian.dim": _median_of_numbers,
}
