"""Determinants, inverses and systems of equations of small matrices: every step of the elimination by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST = 32  # rows: each is a step, of some ten operators


def _is_small(a: Tensor) -> bool:
    return a.dtype.is_floating_point and a.shape[-1] <= LARGEST


def _eliminated(a: Tensor, count: int, singular: bool = False) -> tuple[Tensor, Tensor]:
    """Gauss and Jordan's: the first `count` columns become those of the unit matrix; and their determinant.

    The largest number of what is left of a column comes into its row. `singular`: it may be zero, and the rest of the
    result does not count.
    """
    rows = torch.arange(count)
    product = torch.ones(a.shape[:-2], dtype=a.dtype)
    for k in range(count):
        place = torch.where(rows >= k, a[..., k].abs(), -1.0).argmax(-1, keepdim=True)
        is_there, is_here = (rows == place).unsqueeze(-1), (rows == k).unsqueeze(-1)
        chosen = torch.where(is_there, a, 0.0).sum(-2, keepdim=True)
        a = torch.where(is_here, chosen, torch.where(is_there, a[..., k : k + 1, :], a))
        pivot = chosen[..., k : k + 1]
        product = product * torch.where(place == k, pivot[..., 0], -pivot[..., 0])[..., 0]
        chosen = chosen / (torch.where(pivot == 0, 1.0, pivot) if singular else pivot)
        a = torch.where(is_here, chosen, a - a[..., k : k + 1] * chosen)
    return a, product


def _no_error(a: Tensor) -> Tensor:
    return torch.zeros(a.shape[:-2], dtype=torch.int32)


def _determinant(a: Tensor) -> Any:
    if not _is_small(a):
        return NotImplemented
    rest, product = _eliminated(a, a.shape[-1], singular=True)
    return product, rest, torch.zeros(a.shape[:-1], dtype=torch.int32)


def _logarithm_of_determinant(a: Tensor) -> Any:
    if not _is_small(a):
        return NotImplemented
    product, rest, places = _determinant(a)
    return product.sign(), product.abs().log(), rest, places


def _solved(a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    if not _is_small(a):
        return NotImplemented
    is_vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    wide = b.unsqueeze(-1) if is_vector else b
    both = (a, wide) if left else (a.mT, wide.mT)
    batch = torch.broadcast_shapes(*(each.shape[:-2] for each in both))
    count = a.shape[-1]
    rest, _ = _eliminated(torch.cat([each.expand(*batch, *each.shape[-2:]) for each in both], -1), count)
    found = rest[..., count:] if left else rest[..., count:].mT
    found = found.squeeze(-1) if is_vector else found
    return found, a, torch.zeros(a.shape[:-1], dtype=torch.int32), _no_error(a)


def _inverse(a: Tensor, *, check_errors: bool = False) -> Any:
    if not _is_small(a):
        return NotImplemented
    return _solved(a, torch.eye(a.shape[-1], dtype=a.dtype))[0], _no_error(a)


def _root(a: Tensor, *, upper: bool = False, check_errors: bool = False) -> Any:
    """Cholesky's: a column after the other, and what it explains is taken away."""
    if not _is_small(a):
        return NotImplemented
    a, columns = a.mT if upper else a, []
    rows = torch.arange(a.shape[-1])
    for k in range(a.shape[-1]):
        column = torch.where(rows >= k, a[..., k] / a[..., k, k : k + 1].sqrt(), 0.0)
        columns.append(column)
        a = a - column.unsqueeze(-1) * column.unsqueeze(-2)
    return torch.stack(columns, -2 if upper else -1), _no_error(a)


def _first(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Without the check that PyTorch does behind it, which stops a program and has no place in a library."""

    def without(*args: Any, **kwargs: Any) -> Any:
        found = rule(*args, **kwargs)
        return found if found is NotImplemented else found[0]

    return without


REWRITES = {
    "_linalg_det.default": _determinant,
    "_linalg_slogdet.default": _logarithm_of_determinant,
    "_linalg_solve_ex.default": _solved,
    "linalg_cholesky.default": _first(_root),
    "linalg_cholesky_ex.default": _root,
    "linalg_inv.default": _first(_inverse),
    "linalg_inv_ex.default": _inverse,
    "linalg_solve.default": _first(_solved),
}
