"""Transcendentals as polynomials, on vectors of any width.

The coefficients are minimax fits. `gelu` is the exact (erf) form within 1.2e-6 in float32; in float16 within 1e-3 for
|x| < 2, where rounding alone makes 5e-4. `exp` is for float32: within 2e-7, relative, wherever exp(x) is a normal
number; `erf` within 3e-7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx

from schedules.cpu.builder import Builder, Expr, lanes_of


# GELU is max(x, 0) less |x| times the normal distribution's tail beyond |x|. The tail falls like a Gaussian, which no
# polynomial of low degree does, but a low one squared again and again does: 9 multiply-adds in all, where an even one
# as accurate takes 16. Each square has a constant of its own, which costs nothing and makes up for the low degree.
# In float16 every square doubles the rounding error of what is squared, so two fewer are more accurate, and faster.
@dataclass(frozen=True)
class _Gelu:
    limit: float  # nothing is left of the tail from here on
    base: tuple[float, ...]
    squares: tuple[float, ...]


_GELU = {
    "float32": _Gelu(
        limit=5.25,
        base=(
            0.7884252071380615,
            -0.05238565802574158,
            -0.01961023360490799,
            -0.0012659395579248667,
            0.0006586353410966694,
        ),
        squares=(0.39268067479133606, -0.18747484683990479, -0.0007269073976203799, -5.24853817296389e-07),
    ),
    "float16": _Gelu(
        limit=3.8,
        base=(0.833075225353241, -0.1648516207933426, -0.06095165014266968, 0.01433557365089655),
        squares=(0.012571437284350395, -0.0005625205812975764),
    ),
}

# e^r for |r| <= ln(2) / 2.
_EXP = (
    1.0,
    1.000000003,
    0.4999999074,
    0.1666641976,
    0.04166822607,
    0.008374815607,
    0.001383684769,
)
# erf(x) is 1 less e^(-x^2) times a polynomial of 1 / (1 + p x): Abramowitz and Stegun, 7.1.26.
_ERF_P = 0.3275911
_ERF = (0.0, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part has few bits: products with integers are exact


def polynomial(b: Builder, coefficients: tuple[float, ...], x: Expr) -> Expr:
    """Horner's scheme."""
    lanes = lanes_of(x)
    result = b.splat(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + b.splat(coefficient, lanes)
    return b.compute_once("poly", result)


def gelu(b: Builder, x: Expr) -> Expr:
    """x * Phi(x)."""
    return gelus(b, [x])[0]


def gelus(b: Builder, values: list[Expr]) -> list[Expr]:
    """GELU of several vectors in step, so that each waits for its own last result only and coefficients load once."""
    lanes, fit = lanes_of(values[0]), _GELU[b.dtype]
    values = [b.compute_once("x", x) for x in values]
    limit = b.splat(fit.limit, lanes)
    # In this order: of a pair that is not comparable, minimum and maximum give the second one, so that NaN stays NaN.
    sizes = [b.compute_once("size", tirx.min(limit, tirx.abs(x))) for x in values]
    tails: list[Expr] = [b.splat(fit.base[-1], lanes)] * len(values)
    for coefficient in reversed(fit.base[:-1]):
        addend = b.splat(coefficient, lanes)
        tails = [b.compute_once("tail", tail * size + addend) for tail, size in zip(tails, sizes, strict=True)]
    for coefficient in fit.squares:
        addend = b.splat(coefficient, lanes)
        tails = [b.compute_once("tail", tail * tail + addend) for tail in tails]
    zero = b.splat(0.0, lanes)
    return [b.bind("gelu", tirx.max(zero, x) - size * tail) for x, size, tail in zip(values, sizes, tails, strict=True)]


def exp(b: Builder, x: Expr) -> Expr:
    """e^x: infinity from 88 on, a tiny number where it is next to nothing, and NaN stays NaN."""
    lanes = lanes_of(x)
    wide = x > b.splat(88.0, lanes)
    # In this order, as in GELU.
    x = b.compute_once("x", tirx.max(b.splat(-87.0, lanes), tirx.min(b.splat(88.0, lanes), x)))
    whole = b.compute_once("whole", tirx.floor(x * b.splat(1 / math.log(2), lanes) + b.splat(0.5, lanes)))
    part = b.compute_once("part", x - whole * b.splat(_LN2_HIGH, lanes) - whole * b.splat(_LN2_LOW, lanes))
    part = polynomial(b, _EXP, part)
    integer = "int32" if lanes == 1 else f"int32x{lanes}"
    shift = tirx.const(23, "int32") if lanes == 1 else tirx.Broadcast(tirx.const(23, "int32"), lanes)
    exponent = tirx.shift_left(tirx.Cast(integer, whole), shift)
    power = tirx.reinterpret(part.ty.dtype, tirx.reinterpret(integer, part) + exponent)
    return b.bind("exp", tirx.Select(wide, b.splat(math.inf, lanes), power))


def erf(b: Builder, x: Expr) -> Expr:
    """What of a normal distribution is between -x and x, where its standard deviation is the root of a half."""
    lanes = lanes_of(x)
    zero, one = b.splat(0.0, lanes), b.splat(1.0, lanes)
    size = b.compute_once("size", tirx.abs(x))
    tail = polynomial(b, _ERF, b.compute_once("t", one / (one + size * b.splat(_ERF_P, lanes))))
    inner = b.compute_once("inner", one - tail * exp(b, zero - size * size))
    return b.bind("erf", tirx.Select(x < zero, zero - inner, inner))
