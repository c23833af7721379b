"""Writing at computed places, and looking for a place.

Every place asks which writes are meant for it. What is asked of places that are known does not depend on the picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

NEUTRAL = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}
AT_ONCE = 1 << 26  # comparisons of a place with a write


def _wrapped(index: Tensor, length: int) -> Tensor:
    index = index.to(torch.int64)
    return torch.where(index < 0, index + length, index)


def _put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """The indexed axes become one, in front of all others."""
    if any(each is not None and each.dtype == torch.bool for each in indices):
        return _masked(x, indices, values, accumulate)
    wrapped = {axis: _wrapped(each, x.shape[axis]) for axis, each in enumerate(indices) if each is not None}
    axes = list(wrapped)
    rest = [axis for axis in range(x.dim()) if axis not in axes]
    lengths, others = [x.shape[axis] for axis in axes], [x.shape[axis] for axis in rest]
    given = torch.broadcast_tensors(*wrapped.values())
    place = given[0]
    for each, length in zip(given[1:], lengths[1:], strict=True):
        place = place * length + each
    # Where indexed axes stand side by side, those of the values stand in their place, and in front otherwise.
    at = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    values = values.expand(*others[:at], *place.shape, *others[at:])
    values = values.movedim(list(range(at, at + place.dim())), list(range(place.dim())))
    order = [*axes, *rest]
    flat = x.permute(order).reshape(math.prod(lengths), -1)
    written = _rows(flat, place.reshape(-1), values.reshape(place.numel(), flat.shape[1]), accumulate)
    if written is NotImplemented:
        return written
    return written.reshape([*lengths, *others]).permute([order.index(axis) for axis in range(x.dim())])


def _rows(x: Tensor, place: Tensor, values: Tensor, accumulate: bool) -> Any:
    if x.shape[0] * place.numel() > AT_ONCE:
        return NotImplemented
    there = place == torch.arange(x.shape[0]).unsqueeze(1)
    if accumulate and x.dtype.is_floating_point:
        return x + there.to(x.dtype) @ values
    if accumulate:
        return NotImplemented
    last = torch.where(there, torch.arange(place.numel()), -1).amax(1)
    return torch.where((last >= 0).unsqueeze(1), values.index_select(0, last.clamp(min=0)), x)


def _masked(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool) -> Any:
    """One mask of the first axes, and one value for all of it."""
    mask = indices[0]
    if mask is None or len(indices) > 1 or values.numel() != 1 or values.dim() > 1:
        return NotImplemented
    mask = mask.reshape(*mask.shape, *([1] * (x.dim() - mask.dim())))
    return torch.where(mask, x + values if accumulate else values, x)


def _reduced(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    dim %= x.dim()
    source = source[tuple(slice(length) for length in index.shape)]
    if not x.dtype.is_floating_point or x.shape[dim] * index.numel() > AT_ONCE:
        return NotImplemented
    places = torch.arange(x.shape[dim]).reshape(-1, *([1] * (x.dim() - dim)))
    there = index.unsqueeze(dim) == places  # [.., place, write, ..]
    found = torch.where(there, source.unsqueeze(dim), NEUTRAL[reduce])
    found = getattr(found, "sum" if reduce == "mean" else reduce)(dim + 1)
    missing = [each for axis in reversed(range(x.dim())) for each in (0, x.shape[axis] - found.shape[axis])]
    found, count = pad(found, missing, value=NEUTRAL[reduce]), pad(there.sum(dim + 1).to(x.dtype), missing)
    own = x if include_self else torch.where(count > 0, NEUTRAL[reduce], x)
    if reduce == "prod":
        return own * found
    if reduce in ("amax", "amin"):
        return torch.maximum(own, found) if reduce == "amax" else torch.minimum(own, found)
    if reduce == "sum":
        return own + found
    return (own + found) / (count + 1 if include_self else count.clamp(min=1))


def _combined(x: Tensor, dim: int, index: Tensor, source: Any, *, reduce: str) -> Any:
    source = source if isinstance(source, Tensor) else torch.full(index.shape, source, dtype=x.dtype)
    return _reduced(x, dim, index, source, {"add": "sum", "multiply": "prod"}[reduce])


def _searched(
    line: Tensor, x: Tensor, *, out_int32: bool = False, right: bool = False, side: Any = None, sorter: Any = None
) -> Any:
    """How many numbers of a line come before; before what is no number, all do."""
    if sorter is not None:
        return NotImplemented
    x = x.unsqueeze(-1)
    line = line if line.dim() == 1 else line.unsqueeze(-2)
    before = line <= x if right or side == "right" else line < x
    before = before | x.isnan() if x.dtype.is_floating_point else before
    return before.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _taken(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The next number of the source wherever a mask is true."""
    mask = mask.expand(x.shape)
    place = mask.reshape(-1).cumsum(0).clamp(min=1) - 1
    return torch.where(mask, source.reshape(-1)[place].reshape(x.shape), x)


REWRITES = {
    "bucketize.Tensor": lambda x, line, **how: _searched(line, x, **how),
    "index_put.default": _put,
    "masked_scatter.default": _taken,
    "scatter.reduce": _combined,
    "scatter.value_reduce": _combined,
    "scatter_add.default": lambda x, dim, index, source: _reduced(x, dim, index, source, "sum"),
    "scatter_reduce.two": _reduced,
    "searchsorted.Tensor": _searched,
}
