"""The activations that every generator knows: one row each, for CPUs and GPUs, numpy and the graph alike.

A row's formula is plain arithmetic on a `Value`. What a number and an operation are is a matter of the `Arithmetic`
behind it: vectors of TIR on a CPU, text of TVMScript on a GPU, arrays of numpy, or patterns over the graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


class Arithmetic(ABC):
    """What operations are, for one kind of operand. `number` makes an operand of a Python number, like another."""

    @abstractmethod
    def number(self, value: float, like: Any) -> Any: ...

    @abstractmethod
    def binary(self, name: str, a: Any, b: Any) -> Any:
        """add, subtract, multiply, divide, maximum or minimum."""

    @abstractmethod
    def unary(self, name: str, a: Any) -> Any:
        """exp, tanh or erf."""

    def named(self, name: str, value: Any) -> Any:
        """A value that is used more than once."""
        return value

    def clip(self, value: Any, low: float, high: float) -> Any:
        raised = self.binary("maximum", value, self.number(low, value))
        return self.binary("minimum", raised, self.number(high, value))


@dataclass(frozen=True)
class Value:
    """An operand that formulas can be written with."""

    of: Arithmetic
    raw: Any

    def _with(self, name: str, other: Value | float, turned: bool = False) -> Value:
        raw = other.raw if isinstance(other, Value) else self.of.number(other, self.raw)
        return Value(self.of, self.of.binary(name, raw, self.raw) if turned else self.of.binary(name, self.raw, raw))

    def __add__(self, other: Value | float) -> Value:
        return self._with("add", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._with("multiply", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._with("subtract", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._with("divide", other)

    def __rtruediv__(self, other: float) -> Value:
        return self._with("divide", other, turned=True)

    def __rsub__(self, other: float) -> Value:
        return self._with("subtract", other, turned=True)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Value:
        return 0.0 - self

    def clip(self, low: float, high: float) -> Value:
        return Value(self.of, self.of.clip(self.raw, low, high))

    def maximum(self, other: Value | float) -> Value:
        return self._with("maximum", other)

    def minimum(self, other: Value | float) -> Value:
        return self._with("minimum", other)

    def exp(self) -> Value:
        return Value(self.of, self.of.unary("exp", self.raw))

    def tanh(self) -> Value:
        return Value(self.of, self.of.unary("tanh", self.raw))

    def erf(self) -> Value:
        return Value(self.of, self.of.unary("erf", self.raw))

    def op(self, name: str) -> Value:
        """An operator of the graph that is an activation by itself: only patterns know it."""
        return Value(self.of, self.of.unary(name, self.raw))


Formula = Callable[[Value], Value]


@dataclass(frozen=True)
class Activation:
    """What is computed, and the ways in which graphs write it; the first way is as the formula, where none is given."""

    name: str
    formula: Formula
    graphs: tuple[Formula, ...]


def _sigmoid(x: Value) -> Value:
    return 1.0 / (1.0 + (-x).exp())


# fmt: off
ACTIVATIONS = {
    row.name: row
    for row in (
        Activation("relu", lambda x: x.maximum(0.0), (lambda x: x.op("nn.relu"),)),
        Activation("relu6", lambda x: x.clip(0.0, 6.0), (lambda x: x.clip(0.0, 6.0),)),
        Activation(
            "gelu", lambda x: x * (0.5 + 0.5 * (x * math.sqrt(0.5)).erf()), (lambda x: x.op("nn.gelu"),)
        ),
        Activation("sigmoid", _sigmoid, (lambda x: x.op("sigmoid"),)),
        Activation("silu", lambda x: x * _sigmoid(x), (lambda x: x.op("nn.silu"), lambda x: x * x.op("sigmoid"))),
        Activation("tanh", lambda x: x.tanh(), (lambda x: x.op("tanh"),)),
        Activation(
            "hardsigmoid",
            lambda x: (x + 3.0).clip(0.0, 6.0) * (1 / 6),
            (lambda x: (x + 3.0).clip(0.0, math.inf).clip(-math.inf, 6.0) / 6.0,),
        ),
        Activation(
            "hardswish",
            lambda x: x * (x + 3.0).clip(0.0, 6.0) * (1 / 6),
            (
                lambda x: x * (x + 3.0).clip(0.0, math.inf).clip(-math.inf, 6.0) / 6.0,  # torch.export
                lambda x: x * ((x + 3.0).clip(0.0, 6.0) / 6.0),  # ONNX
            ),
        ),
    )
}
# fmt: on


class Numpy(Arithmetic):
    """Arrays, in the precision that they come in."""

    def number(self, value: float, like: Any) -> Any:
        return value

    def binary(self, name: str, a: Any, b: Any) -> Any:
        return getattr(np, name)(a, b)

    def unary(self, name: str, a: Any) -> Any:
        return np.vectorize(math.erf, otypes=[np.float64])(a) if name == "erf" else getattr(np, name)(a)


def activated(name: str, value: Any, arithmetic: Arithmetic) -> Any:
    """The activation of a value."""
    return ACTIVATIONS[name].formula(Value(arithmetic, arithmetic.named("x", value))).raw


def reference(steps: tuple[str, ...], value: np.ndarray, operands: dict[str, np.ndarray]) -> np.ndarray:
    """An epilogue in numpy; "bias" is the operand `b`, "scale" is `s`, both by the last axis."""
    for step in steps:
        word, _, name = step.partition(" ")
        if word == "bias":
            value = value + operands["b"]
        elif word == "scale":
            value = value * operands["s"]
        elif word in ("add", "multiply"):
            value = getattr(np, word)(value, operands[name])
        else:
            value = activated(word, value, Numpy())
    return value
