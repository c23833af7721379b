"""Functions of one or two numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# M. Giles, Approximating the erfinv function: polynomials for the middle and for both ends, highest power first.
MIDDLE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
ENDS = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


def _polynomial(x: Tensor, numbers: tuple[float, ...]) -> Tensor:
    total = x * numbers[0] + numbers[1]
    for each in numbers[2:]:
        total = total * x + each
    return total


def _inverse_of_erf(x: Tensor) -> Tensor:
    w = -torch.log((1 - x) * (1 + x))
    inner = _polynomial(w - 2.5, MIDDLE)
    outer = _polynomial(w.clamp(min=5.0).sqrt() - 3, ENDS)
    found = x * torch.where(w < 5, inner, outer)
    return torch.where(x.abs() == 1, x * math.inf, found)


def _is_negative(x: Tensor) -> Tensor:
    return (x < 0) | ((x == 0) & (1 / x < 0)) if x.dtype.is_floating_point else x < 0


def _with_sign(x: Tensor, sign: Tensor) -> Tensor:
    size = x.abs()
    return torch.where(_is_negative(sign), -size, size)


def _number_of(choose: Any) -> Any:
    """Where one of two is not a number, the other."""
    return lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, choose(a, b)))


def _leaky(
    x: Tensor, noise: Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, **_: Any
) -> Any:
    if training:
        return NotImplemented
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), noise


# Powers that PyTorch computes without the general one, which takes many times as long: there are no vectors of it.
POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    3: lambda x: x * x * x,
    2: lambda x: x * x,
    0.5: torch.sqrt,
    -0.5: torch.rsqrt,
    -1: torch.reciprocal,
    -2: lambda x: 1 / (x * x),
}


def _power(x: Tensor, power: Any) -> Any:
    if not x.dtype.is_floating_point or isinstance(power, complex) or power not in POWERS:
        return NotImplemented
    return POWERS[power](x)


REWRITES = {
    "copysign.Tensor": _with_sign,
    "erfc.default": lambda x: 1 - torch.erf(x),
    "erfinv.default": _inverse_of_erf,
    "fmax.default": _number_of(torch.maximum),
    "fmin.default": _number_of(torch.minimum),
    "hypot.default": lambda a, b: (a * a + b * b).sqrt(),
    "ldexp.Tensor": lambda x, power: x * torch.exp2(power.to(torch.float32)),
    "pow.Tensor_Scalar": _power,
    "rrelu_with_noise_functional.default": _leaky,
    "signbit.default": _is_negative,
}
