"""An epilogue on vectors of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from schedules.activations import Arithmetic, activated
from schedules.cpu import math
from schedules.cpu.builder import Builder, Expr, cast, lanes_of
from schedules.spec import Epilogue, adds

# operand(name, lanes): the weight `b` or `s`, or another tensor, at the place of the result.
Operand = Callable[[str, int], Expr]

# Activations with an approximation of their own.
FITTED: dict[str, Callable[[Builder, Expr], Expr]] = {"gelu": math.gelu}


class Vectors(Arithmetic):
    """Vectors of TIR, written down by a builder."""

    def __init__(self, b: Builder) -> None:
        self.b = b

    def number(self, value: float, like: Any) -> Any:
        return self.b.splat(value, lanes_of(like))

    def binary(self, name: str, a: Any, b: Any) -> Any:
        if name in ("maximum", "minimum"):
            # The first operand is given only where the comparison holds: a value that is not a number stays so.
            return (tirx.max if name == "maximum" else tirx.min)(b, a)
        return {"add": a.__add__, "subtract": a.__sub__, "multiply": a.__mul__, "divide": a.__truediv__}[name](b)

    def unary(self, name: str, a: Any) -> Any:
        return {"exp": self._exp, "tanh": self._tanh}[name](a)

    def named(self, name: str, value: Any) -> Any:
        return self.b.compute_once(name, value)

    def _exp(self, x: Any) -> Any:
        """In float32 in any case: the bits of its exponent are put together."""
        b = self.b if self.b.dtype == "float32" else Builder32(self.b)
        return cast(math.exp(b, cast(x, "float32")), self.b.dtype)

    def _tanh(self, x: Any) -> Any:
        one, two = (self.number(value, x) for value in (1.0, 2.0))
        return one - two / (self._exp(x + x) + one)


class Builder32(Builder):
    """A view of a builder that computes in float32."""

    def __init__(self, other: Builder) -> None:
        self.__dict__ = {**other.__dict__, "dtype": "float32"}


def applied(b: Builder, epilogue: Epilogue, value: Expr, operand: Operand) -> Expr:
    """The result of an epilogue; neighbouring additions add up their operands first, the last one first of all."""
    for steps in epilogue.sums:
        step = steps[0]
        word, _, name = step.partition(" ")
        if adds(step):
            terms = [operand("b" if each == "bias" else each.partition(" ")[2], lanes_of(value)) for each in steps]
            total = terms[-1]
            for term in reversed(terms[:-1]):
                total = total + term
            value = total + value if len(terms) > 1 else value + total
        elif word in ("multiply", "scale"):
            value = value * operand(name or "s", lanes_of(value))
        elif word in FITTED:
            value = FITTED[word](b, value)
        else:
            value = b.bind(word.partition(":")[0], activated(word, value, Vectors(b)))
    return value
