"""The activations that every generator knows: one row each, for CPUs and GPUs, numpy and the graph alike.

A row's formula is plain arithmetic on a `Value`. What a number and an operation are is a matter of the `Arithmetic`
behind it: vectors of TIR on a CPU, text of TVMScript on a GPU, arrays of numpy, or patterns over the graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
        """An infinite bound is none."""
        raised = self.binary("maximum", value, self.number(low, value)) if low > -math.inf else value
        return self.binary("minimum", raised, self.number(high, value)) if high < math.inf else raised


class Graphs(Arithmetic):
    """That of formulas as graphs write them."""

    @abstractmethod
    def operator(self, name: str, operands: list[Any], attrs: dict[str, Any]) -> Any:
        """An operator of the graph."""


@dataclass(frozen=True)
class Value:
    """An operand that formulas can be written with."""

    of: Arithmetic
    raw: Any

    def _with(self, name: str, other: Value | float, turned: bool = False) -> Value:
        raw = other.raw if isinstance(other, Value) else self.of.number(other, self.raw)
        return replace(self, raw=self.of.binary(name, *((raw, self.raw) if turned else (self.raw, raw))))

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
        return replace(self, raw=self.of.clip(self.raw, low, high))

    def maximum(self, other: Value | float) -> Value:
        return self._with("maximum", other)

    def minimum(self, other: Value | float) -> Value:
        return self._with("minimum", other)

    def exp(self) -> Value:
        return replace(self, raw=self.of.unary("exp", self.raw))

    def tanh(self) -> Value:
        return replace(self, raw=self.of.unary("tanh", self.raw))

    def erf(self) -> Value:
        return replace(self, raw=self.of.unary("erf", self.raw))


@dataclass(frozen=True)
class GraphValue(Value):
    """One of a graph, which has operators besides."""

    of: Graphs

    def op(self, name: str, *others: Value | float, **attrs: Any) -> GraphValue:
        """An operator with this as its first operand."""
        raw = (other.raw if isinstance(other, Value) else self.of.number(other, self.raw) for other in others)
        return replace(self, raw=self.of.operator(name, [self.raw, *raw], attrs))


Formula = Callable[..., Value]


@dataclass(frozen=True)
class Activation:
    """What is computed, and the ways in which graphs write it.

    An activation may have numbers that the formulas take after the value. Its step names them: "leaky:0.01".
    """

    name: str
    formula: Formula
    graphs: tuple[Formula, ...]
    numbers: tuple[float, ...] = ()

    @property
    def step(self) -> str:
        """Numbers as short as float32 allows: what PyTorch and ONNX read from a file is the same text."""
        return ":".join([self.name, *(str(np.float32(number)) for number in self.numbers)])


class _Table(Mapping[str, Activation]):
    """The rows by their steps; a row with numbers of its own is one of any numbers."""

    def __init__(self, *rows: Activation) -> None:
        self._rows = {row.name: row for row in rows}

    def __getitem__(self, step: str) -> Activation:
        name, *numbers = step.split(":")
        row = self._rows[name]
        try:
            found = replace(row, numbers=tuple(map(float, numbers)))
        except ValueError:
            raise KeyError(step) from None
        if len(numbers) != len(row.numbers):
            raise KeyError(step)
        return found

    def __iter__(self) -> Iterator[str]:
        return (row.step for row in self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)


def _sigmoid(x: Value) -> Value:
    return 1.0 / (1.0 + (-x).exp())


def _bent(x: Value) -> Value:
    """What GELU's tanh form has the tangent of."""
    return math.sqrt(2 / math.pi) * (x + 0.044715 * (x * (x * x)))


def _cubed(x: GraphValue) -> Value:
    """The same with a power."""
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x.op("power", 3.0))


def _mish(x: Value) -> Value:
    """tanh(log(1 + e^x)) without a logarithm; where e^x is infinite, the quotient is 0."""
    e = x.exp()
    return x * (1.0 - 2.0 / (e * (e + 2.0) + 2.0))


# fmt: off
ACTIVATIONS: Mapping[str, Activation] = _Table(
    *(
        Activation("relu", lambda x: x.maximum(0.0), (lambda x: x.op("nn.relu"),)),
        Activation("relu6", lambda x: x.clip(0.0, 6.0), (lambda x: x.clip(0.0, 6.0),)),
        Activation(
            "gelu", lambda x: x * (0.5 + 0.5 * (x * math.sqrt(0.5)).erf()), (lambda x: x.op("nn.gelu"),)
        ),
        Activation(
            "gelu_tanh",
            # 1 + tanh(u) is 2 sigmoid(2u), and exactly 0 for minus infinity, which a device's tanh may miss by a bit.
            lambda x: x * _sigmoid(2.0 * _bent(x)),
            (
                lambda x: x.op("nn.gelu_tanh"),
                lambda x: 0.5 * (x * (1.0 + _bent(x).tanh())),  # torch.onnx
                lambda x: (0.5 * x) * (1.0 + _cubed(x).tanh()),  # Hugging Face, in ONNX
                lambda x: (0.5 * x) * (1.0 + _bent(x).tanh()),
            ),
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
                lambda x: x * (x * (1 / 6) + 0.5).clip(0.0, 1.0),  # ONNX's operator
            ),
        ),
        Activation(
            "mish",
            _mish,
            (
                lambda x: x * x.op("greater", 20.0).op("where", x, (x.exp() + 1.0).op("log")).tanh(),  # torch.export
                lambda x: x * (x.exp() + 1.0).op("log").tanh(),  # ONNX's operator
                lambda x: x * (x.maximum(0.0) + (x.op("abs").op("negative").exp() + 1.0).op("log")).tanh(),
            ),
        ),
        Activation(
            "elu",
            lambda x: x.maximum(0.0) + (x.minimum(0.0).exp() - 1.0),
            (
                lambda x: x.op("nn.relu") - (1.0 - x.exp()).op("nn.relu"),
                lambda x: -1.0 * (1.0 - x.exp()).op("nn.relu") + x.op("nn.relu"),  # ONNX
            ),
        ),
        Activation(
            "leaky",
            lambda x, slope: x.maximum(0.0) + x.minimum(0.0) * slope,
            (lambda x, slope: x.op("nn.leakyrelu", alpha=slope),),
            numbers=(0.01,),
        ),
        Activation("clip", Value.clip, (Value.clip,), numbers=(-1.0, 1.0)),
    )
)
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
    row = ACTIVATIONS[name]
    return row.formula(Value(arithmetic, arithmetic.named("x", value)), *row.numbers).raw


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
