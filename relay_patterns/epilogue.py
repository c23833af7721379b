"""What follows a primitive and can be done before its result is stored: bias, activations, other tensors.

A chain is followed forward from the primitive's result, as long as nothing else reads what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.dpl import DFPattern, is_const, is_op, wildcard

from relay_patterns.graph import Graph
from relay_patterns.region import array, extents, per_channel
from schedules.activations import ACTIVATIONS, Arithmetic, Value

STEPS = 4  # at most, behind the bias
APART = 4  # operators at most between an activation's argument and its value


@dataclass(frozen=True)
class Chain:
    """Steps so far, the other tensors that they read, the bias, and the variable that has the result."""

    result: relax.Var
    steps: tuple[str, ...] = ()
    operands: dict[str, relax.Expr] = field(default_factory=dict)
    bias: np.ndarray | None = None

    def then(self, step: str, result: relax.Var, **changes: Any) -> Chain:
        return replace(self, result=result, steps=(*self.steps, step), **changes)


def chains(graph: Graph, var: relax.Var, channels: int, axis: int) -> list[Chain]:
    """All chains that begin behind a primitive's result, the longest first; channels lie along `axis`."""
    found = [Chain(var)]
    if biased := _biased(graph, found[-1], channels, axis):
        found.append(biased)
    while len(found[-1].steps) < STEPS + 1 and (longer := _longer(graph, found[-1])):
        found.append(longer)
    return found[::-1]


def _biased(graph: Graph, chain: Chain, channels: int, axis: int) -> Chain | None:
    for user, other in _combined(graph, chain.result, "relax.add"):
        rank = len(extents(chain.result))
        if isinstance(other, tvm.ir.GenericConst):
            bias = per_channel(other, channels, rank, axis)
            return None if bias is None else chain.then("bias", user, bias=bias)
    return None


def _longer(graph: Graph, chain: Chain) -> Chain | None:
    if active := _activated(graph, chain.result):
        return chain.then(*active)
    for word in ("add", "multiply"):
        for user, other in _combined(graph, chain.result, f"relax.{word}"):
            if isinstance(other, relax.Var) and extents(other) == extents(chain.result) == extents(user):
                name = f"residual{len(chain.operands) or ''}"
                return chain.then(f"{word} {name}", user, operands={**chain.operands, name: other})
    return None


def _combined(graph: Graph, var: relax.Var, op: str) -> Iterator[tuple[relax.Var, relax.Expr]]:
    """The only user of a value, if it combines it with another one: the user, and the other."""
    users = graph.users(var)
    call = graph.call(users[0]) if len(users) == 1 and var not in graph.outputs else None
    if call is not None and call.op == tvm.ir.Op.get(op):
        left, right = call.args
        if left.same_as(var) != right.same_as(var):
            yield users[0], right if left.same_as(var) else left


# Activations ------------------------------------------------------------------


class _Patterns(Arithmetic):
    """Formulas as patterns over the graph, and the numbers that must stand in a match."""

    def __init__(self) -> None:
        self.numbers: list[tuple[DFPattern, float]] = []
        self.clips: list[tuple[DFPattern, tuple[float, float]]] = []

    def number(self, value: float, like: Any) -> DFPattern:
        self.numbers.append((is_const(), value))
        return self.numbers[-1][0]

    def binary(self, name: str, a: Any, b: Any) -> DFPattern:
        return is_op(f"relax.{name}")(a, b)

    def unary(self, name: str, a: Any) -> DFPattern:
        return is_op(f"relax.{name}")(a)

    def clip(self, value: Any, low: float, high: float) -> DFPattern:
        self.clips.append((is_op("relax.clip")(value, wildcard(), wildcard()), (low, high)))
        return self.clips[-1][0]

    def fit(self, matched: Any) -> bool:
        """Whether the numbers of a match are those of the formula."""
        numbers = all(np.all(np.float32(value) == array(matched[each])) for each, value in self.numbers)
        return numbers and all(_bounds(matched[each]) == bounds for each, bounds in self.clips)


def _bounds(clip: relax.Call) -> tuple[float, float]:
    low, high = (float(getattr(bound, "value", bound)) for bound in clip.args[1:])
    return low, high


@cache
def _forms() -> list[tuple[str, DFPattern, DFPattern, _Patterns]]:
    """Every way to write an activation: its name, the argument, the value, and what must fit."""
    found = []
    for row in ACTIVATIONS.values():
        for form in row.graphs:
            arithmetic, x = _Patterns(), wildcard()
            found.append((row.name, x, form(Value(arithmetic, x)).raw, arithmetic))
    return found


def _activated(graph: Graph, var: relax.Var) -> tuple[str, relax.Var] | None:
    """The activation that all users of a value belong to, and the variable that has its value."""
    if var in graph.outputs:
        return None
    for last in _behind(graph, var):
        inner = graph.between([var], last)
        if inner is None or any(user not in inner and not user.same_as(last) for user in graph.users(var)):
            continue
        for name, x, pattern, arithmetic in _forms():
            matched = pattern.extract_matched_expr(graph.values[last], graph.values)
            if matched is not None and graph.variable(matched[x]).same_as(var) and arithmetic.fit(matched):
                return name, last
    return None


def _behind(graph: Graph, var: relax.Var) -> list[relax.Var]:
    """What is computed from a value in a few steps, the nearest first."""
    found: list[relax.Var] = []
    nearest = [var]
    for _ in range(APART):
        nearest = [user for each in nearest for user in graph.users(each) if graph.call(user) is not None]
        found += [user for user in nearest if user not in found]
    return found
