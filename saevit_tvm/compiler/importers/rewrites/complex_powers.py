"""Of complex numbers: logarithms, powers, products of many, and whether two are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MULTIPLIED = 16  # a whole power up to which is a product


def _is_complex(*values: Any) -> bool:
    return any(each.is_complex() if isinstance(each, Tensor) else isinstance(each, complex) for each in values)


def _of_complex(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves real numbers to others."""
    return lambda *args, **kwargs: rule(*args, **kwargs) if _is_complex(*args) else NotImplemented


def _complex(x: Tensor) -> Tensor:
    return x if x.is_complex() else x.to(torch.complex64)


def _logarithm(x: Tensor) -> Tensor:
    return torch.complex(x.abs().log(), x.angle())


def _power(x: Any, power: Any) -> Tensor:
    if isinstance(power, (int, float)) and power in range(1, MULTIPLIED + 1):
        return x if power == 1 else _power(x, power // 2) * _power(x, power - power // 2)
    if not isinstance(x, Tensor):
        return torch.exp(_complex(power) * torch.log(torch.full((), x, dtype=torch.complex64)))
    x = _complex(x)
    nothing = x.abs() == 0
    found = torch.exp(power * _logarithm(torch.where(nothing, torch.ones_like(x), x)))
    return torch.where(nothing, torch.zeros_like(found), found)


def _product(x: Tensor, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Halves are multiplied until one number is left."""
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        rest = x.narrow(dim, 2 * half, x.shape[dim] - 2 * half)
        x = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = torch.cat((x, rest), dim) if rest.shape[dim] else x
    return x if keepdim else x.squeeze(dim)


def _are_same(a: Tensor, b: Tensor) -> Tensor:
    a, b = _complex(a), _complex(b)
    return (a.real == b.real) & (a.imag == b.imag)


REWRITES = {
    "eq.Tensor": _of_complex(_are_same),
    "ne.Tensor": _of_complex(lambda a, b: ~_are_same(a, b)),
    "pow.Scalar": _of_complex(_power),
    "pow.Tensor_Scalar": _of_complex(_power),
    "pow.Tensor_Tensor": _of_complex(_power),
    "log.default": _of_complex(_logarithm),
    "prod.dim_int": _of_complex(_product),
    "sqrt.default": _of_complex(lambda x: _power(x, 0.5)),
}
