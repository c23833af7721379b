"""Transcendentals as polynomials, on vectors of any width, for float32.

The coefficients are minimax fits. `gelu` is the exact (erf) form within 1e-6 * max(1, |x|); `exp` is within 2e-7,
relative, wherever exp(x) is a normal number.
"""

from __future__ import annotations

import math

from tvm import tirx

from schedules.cpu.builder import Builder, Expr, lanes_of, splat

# Phi(x) - 1/2 = x * P(2 (x / LIMIT)^2 - 1) for |x| <= LIMIT, where Phi is the normal distribution's.
_GELU_LIMIT = 5.1
_GELU = (
    0.1386052817106247,
    -0.06900326162576675,
    0.050782956182956696,
    -0.04021865874528885,
    0.03171602636575699,
    -0.02401646226644516,
    0.01746547780930996,
    -0.01202426664531231,
    0.006859952118247747,
    -0.0032296127174049616,
    0.0024043943267315626,
    -0.0019568356219679117,
    0.0006542076589539647,
)

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
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part has few bits: products with integers are exact


def polynomial(b: Builder, coefficients: tuple[float, ...], x: Expr) -> Expr:
    """Horner's scheme."""
    lanes = lanes_of(x)
    result = splat(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + splat(coefficient, lanes)
    return b.bind("poly", result)


def gelu(b: Builder, x: Expr) -> Expr:
    """x * Phi(x)."""
    return gelus(b, [x])[0]


def gelus(b: Builder, values: list[Expr]) -> list[Expr]:
    """GELU of several vectors in step, so that each waits for its own last result only and coefficients load once."""
    lanes = lanes_of(values[0])
    values = [b.bind("x", x) for x in values]
    low, high = splat(-_GELU_LIMIT, lanes), splat(_GELU_LIMIT, lanes)
    clamped = [b.bind("clamped", tirx.max(tirx.min(x, high), low)) for x in values]
    scale, one = splat(2 / _GELU_LIMIT**2, lanes), splat(1.0, lanes)
    arguments = [b.bind("argument", x * x * scale - one) for x in clamped]
    slopes: list[Expr] = [splat(_GELU[-1], lanes)] * len(values)
    for coefficient in reversed(_GELU[:-1]):
        addend = splat(coefficient, lanes)
        slopes = [b.bind("slope", s * u + addend) for s, u in zip(slopes, arguments, strict=True)]
    half = splat(0.5, lanes)
    shares = [b.bind("share", x * slope + half) for x, slope in zip(clamped, slopes, strict=True)]
    return [b.bind("gelu", x * share) for x, share in zip(values, shares, strict=True)]


def exp(b: Builder, x: Expr) -> Expr:
    """e^x; arguments beyond what float32 can hold are clamped."""
    lanes = lanes_of(x)
    x = tirx.max(tirx.min(x, splat(88.0, lanes)), splat(-87.0, lanes))
    x = b.bind("x", x)
    whole = b.bind("whole", tirx.floor(x * splat(1 / math.log(2), lanes) + splat(0.5, lanes)))
    part = b.bind("part", x - whole * splat(_LN2_HIGH, lanes) - whole * splat(_LN2_LOW, lanes))
    part = polynomial(b, _EXP, part)
    integer = "int32" if lanes == 1 else f"int32x{lanes}"
    shift = tirx.const(23, "int32") if lanes == 1 else tirx.Broadcast(tirx.const(23, "int32"), lanes)
    exponent = tirx.shift_left(tirx.Cast(integer, whole), shift)
    return b.bind("exp", tirx.reinterpret(part.ty.dtype, tirx.reinterpret(integer, part) + exponent))
