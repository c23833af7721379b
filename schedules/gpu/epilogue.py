"""An epilogue as text of TVMScript, on the results that a work-item has in registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schedules.activations import Arithmetic, activated
from schedules.gpu.launch import Buffer, Memory, nest
from schedules.spec import Epilogue

BIAS = Epilogue(("bias",))
BIAS_GELU = Epilogue(("bias", "gelu"))
BIAS_RESIDUAL = Epilogue(("bias", "add residual"))
OPERATORS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
COMPARISONS = {"maximum": "<", "minimum": ">"}
CHOICE = "T.if_then_else"
# Few of the languages can choose lane by lane. In CUDA, TVM takes a vector apart to call a function of its lanes, and
# goes on with these parts when the vector has long been written anew.
LANE_BY_LANE = (CHOICE, "T.tanh(", "T.exp(")


class Text(Arithmetic):
    """Expressions of float32."""

    def number(self, value: float, like: Any) -> Any:
        return f"T.float32({float(value)!r})"

    def binary(self, name: str, a: Any, b: Any) -> Any:
        if name in COMPARISONS:
            # No T.max: a device may take the other number where one is NaN. Here no comparison with it holds.
            return f"{CHOICE}({a} {COMPARISONS[name]} {b}, {b}, {a})"
        return f"({a} {OPERATORS[name]} {b})"

    def unary(self, name: str, a: Any) -> Any:
        return f"T.{name}({a})"


def gelu(value: str) -> str:
    """GELU by the device's own error function, which is one for float32."""
    return f"{value} * (T.float32(0.5) + T.float32(0.5) * T.erf({value} * T.float32({0.5**0.5!r})))"


# Activations that are written in a way of their own.
FITTED: dict[str, Callable[[str], str]] = {"gelu": gelu}


PLANE = "plane"  # begins the name of an operand that has one number an image and channel


def epilogue_reads(
    epilogue: Epilogue, out: Buffer, channels: int, images: int | None = None, bias: str = "b"
) -> dict[str, Buffer]:
    """What an epilogue reads, in the order in which a plan gives it; of `images`, planes are known."""
    found = {}
    for step, name in (("bias", bias), ("scale", "factor")):
        if step in epilogue.steps:
            found[name] = Buffer((channels,))
    for operand in epilogue.operands:
        plane = Buffer((images, channels, 1, 1), out.dtype) if images and operand.startswith(PLANE) else None
        found[operand] = plane or out
    return found


@dataclass(frozen=True)
class Results:
    """`lanes` neighbouring results, which are stored together from `target` on.

    `value` is the number in registers of lane v, `channel` the place of its weights, `plane` that of its image and
    channel. `more` is room for an operand's numbers.
    """

    memory: Memory
    lanes: int
    value: str
    channel: str
    target: str
    plane: str = ""
    offset: str = "b"

    @property
    def bias(self) -> str:
        return f"{self.offset}[{self.channel}]"

    def through(self, steps: tuple[str, ...]) -> list[str]:
        """The statements of some steps."""
        found = []
        for step in steps:
            word, _, operand = step.partition(" ")
            if operand and not operand.startswith(PLANE):
                found.append(self.memory.load_lanes("more", "0", operand, self.target, self.lanes))
            found.append(self._each_lane(self._result(word, operand)))
        return found

    def _result(self, word: str, operand: str) -> str:
        if word == "bias":
            return f"{self.value} + {self.bias}"
        if word == "scale":
            return f"{self.value} * factor[{self.channel}]"
        if operand.startswith(PLANE):
            return f"{self.value} {OPERATORS[word]} {self.memory.load(operand, self.plane)}"
        if word in OPERATORS:
            return f"{self.value} {OPERATORS[word]} more[v]"
        return FITTED[word](self.value) if word in FITTED else activated(word, self.value, Text())

    def _each_lane(self, result: str) -> str:
        loop = "unroll" if any(each in result for each in LANE_BY_LANE) else "vectorized"
        return nest(f"for v in T.{loop}({self.lanes}):", f"{self.value} = {result}")


def split(epilogue: Epilogue) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Whether a bias comes first; the steps after it that need no other tensor, and from the first on that does."""
    starts = epilogue.steps[:1] == ("bias",)
    steps = epilogue.steps[1:] if starts else epilogue.steps
    first = next((at for at, step in enumerate(steps) if " " in step), len(steps))
    return starts, steps[:first], steps[first:]
