"""The contract between graph and kernel: what a kernel computes, as plain data.

A pattern writes a spec in logical form (float32, images as PyTorch lays them out). The phases `precision` and `layout`
rewrite its fields. It is written onto the declared kernel and read back from there; nothing is matched twice. Its
canonical text is also the key of a tuning record, so a field at its default is not written: a new field changes no
key that is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

FLOAT = "float32"

# Attributes that are not written where they have these values.
DEFAULTS: Mapping[str, Any] = {
    "strides": (1, 1),
    "padding": (0, 0, 0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "count_padding": False,
    "exact": False,
}


@dataclass(frozen=True)
class Tensor:
    """An input, a weight or an output. `layout` names the axes of an image; `strides` are those of a view."""

    name: str
    shape: tuple[int, ...]
    dtype: str = FLOAT
    layout: str = ""
    strides: tuple[int, ...] = ()

    def axes(self, order: str) -> tuple[int, ...]:
        """The extents of an image in another order of its axes."""
        return tuple(self.shape[self.layout.index(axis)] for axis in order)

    def laid_out(self, layout: str) -> Tensor:
        """The same image in another order of its axes."""
        return replace(self, shape=self.axes(layout), layout=layout)

    @property
    def text(self) -> str:
        """As in "1x56x56x48 NHWC float16"."""
        words = ["x".join(map(str, self.shape)), self.layout, self.dtype if self.dtype != FLOAT else ""]
        words += [f"strides={'x'.join(map(str, self.strides))}"] if self.strides else []
        return " ".join(filter(None, words))

    @classmethod
    def parse(cls, name: str, text: str) -> Tensor:
        found: dict[str, Any] = {}
        extents, *words = text.split(" ")
        for word in words:
            if word.startswith("strides="):
                found["strides"] = _numbers(word.removeprefix("strides="))
            else:
                found["layout" if word.isupper() else "dtype"] = word
        return cls(name, _numbers(extents), **found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("x")) if text else ()


# The step behind which all channels of the input stand before those of the result, and what follows is done to both.
BESIDE = "beside"
# Steps that combine a result with a weight by channel, and the weight's name.
BY_CHANNEL: Mapping[str, str] = {"bias": "b", "scale": "s"}


@dataclass(frozen=True)
class Epilogue:
    """What is done to a result before it is stored, step by step; defined once for all generators.

    A step is "bias" (adds the weight `b` by channel), "scale" (multiplies by the weight `s` by channel), an activation
    of `schedules.activations`, or "add NAME" or "multiply NAME": another tensor of the result's shape, or of one number
    an image and channel. "beside" makes a result twice as wide, which begins with the input as it is.
    """

    steps: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Epilogue, Epilogue]:
        """What is done to the result alone, and what is done with the input beside it."""
        alone = self.steps.index(BESIDE) if BESIDE in self.steps else len(self.steps)
        return Epilogue(self.steps[:alone]), Epilogue(self.steps[alone + 1 :])

    @property
    def operands(self) -> tuple[str, ...]:
        """The other tensors, in order."""
        return tuple(step.partition(" ")[2] for step in self.steps if " " in step)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights by channel that it needs."""
        return tuple(name for step, name in BY_CHANNEL.items() if step in self.steps)

    @property
    def sums(self) -> tuple[tuple[str, ...], ...]:
        """The steps, neighbouring additions together: generators add the value last, which is the largest."""
        found: list[list[str]] = []
        for step in self.steps:
            if adds(step) and found and adds(found[-1][0]):
                found[-1].append(step)
            else:
                found.append([step])
        return tuple(map(tuple, found))


def adds(step: str) -> bool:
    return step == "bias" or step.startswith("add ")


@dataclass(frozen=True)
class KernelSpec:
    """`op` says what is computed, `attrs` how. Weights are in natural layout and float32: packing rounds them once."""

    op: str
    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attrs: tuple[tuple[str, Any], ...] = ()
    epilogue: Epilogue = field(default_factory=Epilogue)

    @classmethod
    def of(
        cls,
        op: str,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        outputs: Sequence[Tensor],
        attrs: Mapping[str, Any] | None = None,
        epilogue: Sequence[str] = (),
    ) -> KernelSpec:
        """A spec without attributes at their default."""
        written = {name: _frozen(value) for name, value in (attrs or {}).items()}
        kept = {name: value for name, value in written.items() if name not in DEFAULTS or value != DEFAULTS[name]}
        attributes = tuple(sorted(kept.items()))
        return cls(op, tuple(inputs), tuple(weights), tuple(outputs), attributes, Epilogue(tuple(epilogue)))

    def __getitem__(self, attr: str) -> Any:
        """An attribute, or its default."""
        return dict(self.attrs)[attr] if attr in dict(self.attrs) else DEFAULTS[attr]

    def get(self, attr: str, default: Any = None) -> Any:
        return dict(self.attrs).get(attr, DEFAULTS.get(attr, default))

    def laid_out(self, layout: str) -> KernelSpec:
        """The same with all images in another order of their axes."""

        def turned(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(each.laid_out(layout) if each.layout else each for each in tensors)

        return replace(self, inputs=turned(self.inputs), outputs=turned(self.outputs))

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.inputs[0]

    @property
    def out(self) -> Tensor:
        """The first output."""
        return self.outputs[0]

    def weight(self, name: str) -> Tensor:
        return next(tensor for tensor in self.weights if tensor.name == name)

    @property
    def numbers(self) -> list[float]:
        """All extents and numeric attributes, in the order of the text."""
        tensors = (*self.inputs, *self.weights, *self.outputs)
        found = [float(extent) for tensor in tensors for extent in tensor.shape]
        for _, value in self.attrs:
            found += [float(each) for each in (value if isinstance(value, tuple) else (value,)) if _is_number(each)]
        return found

    @property
    def text(self) -> str:
        """The canonical text: equal for equal specs, and for these alone."""
        parts: dict[str, Any] = {"op": self.op}
        for name in ("inputs", "weights", "outputs"):
            tensors = getattr(self, name)
            parts |= {name: {tensor.name: tensor.text for tensor in tensors}} if tensors else {}
        parts |= {"attrs": dict(self.attrs)} if self.attrs else {}
        parts |= {"epilogue": self.epilogue.steps} if self.epilogue.steps else {}
        return json.dumps(parts, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> KernelSpec:
        """The spec of a canonical text."""
        parts = json.loads(text)

        def tensors(name: str) -> tuple[Tensor, ...]:
            return tuple(Tensor.parse(each, said) for each, said in parts.get(name, {}).items())

        inputs, weights, outputs = map(tensors, ("inputs", "weights", "outputs"))
        attrs = {name: _frozen(value) for name, value in parts.get("attrs", {}).items()}
        return cls.of(parts["op"], inputs, weights, outputs, attrs, parts.get("epilogue", ()))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
