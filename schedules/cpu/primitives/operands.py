"""The other tensors of an epilogue, as the primitives take them."""

from __future__ import annotations

from collections.abc import Sequence

from schedules.cpu.builder import Buffer, Builder, Expr
from schedules.cpu.epilogue import Operand
from schedules.spec import KernelSpec


def fit(spec: KernelSpec, own: int = 1) -> bool:
    """Whether the inputs after the kernel's own are the operands of its epilogue, each of the result's shape.

    And whether no input is a view, whose elements would lie elsewhere.
    """
    others = spec.inputs[own:]
    named = tuple(each.name for each in others) == spec.epilogue.operands
    whole = not any(each.strides for each in spec.inputs)
    return named and whole and all(each.shape == spec.out.shape and each.layout == spec.out.layout for each in others)


def parameters(b: Builder, names: Sequence[str], result: Sequence[int]) -> dict[str, Buffer]:
    return {name: b.param(name, result) for name in names}


def at(b: Builder, others: dict[str, Buffer], place: Expr, bias: Buffer | None = None, channel: Expr = 0) -> Operand:
    """The operands of the vector that begins at a place of the result; its bias begins at a channel."""

    def operand(name: str, lanes: int) -> Expr:
        return b.load(bias, channel, lanes) if name == "b" else b.load(others[name], place, lanes)

    return operand
