"""The epilogue of a primitive: whether its loops can do it, the parameters that it needs, and what it does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from schedules.activations import ACTIVATIONS
from schedules.cpu.builder import Buffer, Builder, Expr
from schedules.cpu.epilogue import Operand, applied
from schedules.spec import BY_CHANNEL, Epilogue, KernelSpec, Tensor

PARAMETERS = {"b": "bias", "s": "scale"}


def fit(spec: KernelSpec, own: int = 1, gated: bool = False, also: Collection[str] = ()) -> bool:
    """Whether the inputs after the kernel's own are the operands of its epilogue, and its steps are known.

    An operand has the result's shape; if `gated`, it may have one number an image and channel instead. No input may
    be a view, whose elements would lie elsewhere. `also` are steps that only this kernel knows.
    """
    others = spec.inputs[own:]
    named = tuple(each.name for each in others) == spec.epilogue.operands
    words = [step.partition(" ") for step in spec.epilogue.steps]
    known = all(
        word in (("add", "multiply") if name else {*BY_CHANNEL, *ACTIVATIONS, *also}) for word, _, name in words
    )
    whole = not any(each.strides for each in spec.inputs)
    return (
        named
        and known
        and whole
        and all(_as_large(each, spec.out) or (gated and _is_gate(each, spec.out)) for each in others)
    )


def weighted(spec: KernelSpec, own: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the weights are the kernel's own, and after them those of its epilogue, one number a channel."""
    found = {each.name: each.shape for each in spec.weights}
    return found == {**own, **dict.fromkeys(spec.epilogue.weights, spec.out.shape[-1:])}


def gates(spec: KernelSpec) -> tuple[str, ...]:
    """The operands of one number an image and channel."""
    operands = {each.name: each for each in spec.inputs if each.name in spec.epilogue.operands}
    return tuple(name for name, each in operands.items() if not _as_large(each, spec.out))


def _as_large(operand: Tensor, out: Tensor) -> bool:
    return operand.shape == out.shape and operand.layout == out.layout


def _is_gate(operand: Tensor, out: Tensor) -> bool:
    return out.layout == operand.layout == "NHWC" and operand.shape == (out.shape[0], 1, 1, out.shape[3])


class Spot(NamedTuple):
    """Where a vector of results begins: its place in all results, its channel, and the image that it is of."""

    place: Expr
    channel: Expr
    image: Expr = 0


class Ending:
    """The epilogue of one kernel. Made where the kernel declares its inputs: it declares the other tensors.

    `declare_weights` declares its weights by channel, after the kernel's own; a kernel that packs them with its own
    says in `done` where they lie.
    """

    def __init__(self, b: Builder, epilogue: Epilogue, result: Sequence[int], gates: Sequence[str] = ()) -> None:
        self.b, self.epilogue, self.gates, self.channels = b, epilogue, gates, result[-1]
        gate = (result[0], *[1] * (len(result) - 2), self.channels)
        self.others = {name: b.param(name, gate if name in gates else result) for name in epilogue.operands}
        self._weights: dict[str, Buffer] = {}

    def declare_weights(self) -> None:
        self._weights = {name: self.b.param(PARAMETERS[name], (self.channels,)) for name in self.epilogue.weights}

    def done(self, value: Expr, spot: Spot, packed: Mapping[str, tuple[Buffer, Expr]] | None = None) -> Expr:
        """What is to be stored for a vector of results."""
        weights = packed or {name: (buffer, spot.channel) for name, buffer in self._weights.items()}

        def operand(name: str, lanes: int) -> Expr:
            if name in weights:
                return self.b.load(*weights[name], lanes)
            place = spot.image * self.channels + spot.channel if name in self.gates else spot.place
            return self.b.load(self.others[name], place, lanes)

        return applied(self.b, self.epilogue, value, operand)


def constants(epilogue: Epilogue, weights: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The weights by channel, in the order in which they are declared."""
    return [np.asarray(weights[name], np.float32) for name in epilogue.weights]


def parameters(b: Builder, names: Sequence[str], result: Sequence[int]) -> dict[str, Buffer]:
    return {name: b.param(name, result) for name in names}


def at(b: Builder, others: dict[str, Buffer], place: Expr, bias: Buffer | None = None, channel: Expr = 0) -> Operand:
    """The operands of the vector that begins at a place of the result; its bias begins at a channel."""

    def operand(name: str, lanes: int) -> Expr:
        return b.load(bias, channel, lanes) if name == "b" else b.load(others[name], place, lanes)

    return operand
