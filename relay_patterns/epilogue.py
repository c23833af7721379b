"""What follows a primitive and can be done before its result is stored: a bias, a scale, activations, other tensors.

A chain is followed forward from the primitive's result, as long as nothing else reads what it leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import tvm
from tvm import relax
from tvm.relax.dpl import DFPattern, is_const, is_op, wildcard

from relay_patterns.graph import Graph
from relay_patterns.region import Reading, array, extents, per_channel
from schedules.activations import ACTIVATIONS, Activation, Graphs, GraphValue
from schedules.spec import BESIDE, BY_CHANNEL, Epilogue

STEPS = 4  # at most, behind the bias
APART = 4  # operators at most between an activation's argument and its value


@dataclass(frozen=True)
class Chain:
    """Steps so far, what they read, and the variable that has the result.

    `factor` and `shift` are no steps: what the primitive's own weights are to be multiplied by, and what is then to be
    added to them.
    """

    result: relax.Var
    steps: tuple[str, ...] = ()
    operands: dict[str, relax.Expr] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    factor: np.ndarray | float = 1.0
    shift: np.ndarray | float = 0.0

    def then(self, step: str, result: relax.Var, **changes: Any) -> Chain:
        return replace(self, result=result, steps=(*self.steps, step), **changes)


class _Channels(NamedTuple):
    """How many there are, and along which axis; the steps that can go into the primitive's own weights; what can come
    before them."""

    number: int
    axis: int
    folds: tuple[str, ...]
    beside: relax.Expr | None = None


def chains(
    graph: Graph,
    var: relax.Var,
    channels: int,
    axis: int,
    folds: tuple[str, ...] = (),
    beside: relax.Expr | None = None,
) -> list[Chain]:
    """All chains that begin behind a primitive's result, the longest first.

    `beside` is what the primitive can put before its result, along the channels.
    """
    along = _Channels(channels, axis, folds, beside)
    found = [Chain(var)]
    while len(found[-1].steps) < STEPS + 1 and (longer := _longer(graph, found[-1], along)):
        found.append(longer)
    return found[::-1]


def continued(graph: Graph, result: relax.Var, reading: Reading) -> Iterator[tuple[relax.Var, Reading]]:
    """A block with what follows it and needs no weights, the longest first."""
    for chain in chains(graph, result, extents(result)[1], axis=1):
        if not chain.weights:
            spec, out = reading.spec, reading.spec.out
            others = [replace(out, name=name, shape=extents(each)) for name, each in chain.operands.items()]
            ending = Epilogue((*spec.epilogue.steps, *chain.steps))
            spec = replace(spec, inputs=(*spec.inputs, *others), epilogue=ending)
            yield chain.result, reading._replace(spec=spec, inputs=(*reading.inputs, *chain.operands.values()))


def _longer(graph: Graph, chain: Chain, along: _Channels) -> Chain | None:
    # Activations first: what one of them adds or multiplies by looks like a weight.
    if active := _activated(graph, chain.result):
        return chain.then(*active)
    if BESIDE in chain.steps:
        return _joined(graph, chain, along)
    return _weighted(graph, chain, along) or _joined(graph, chain, along) or _beside(graph, chain, along)


def _weighted(graph: Graph, chain: Chain, along: _Channels) -> Chain | None:
    """A constant by channel, or of one number, is added or multiplied by."""
    for op, step in (("add", "bias"), ("multiply", "scale")):
        for user, other in _combined(graph, chain.result, f"relax.{op}"):
            whole, name = extents(chain.result), BY_CHANNEL[step]
            constant = isinstance(other, tvm.ir.GenericConst) and extents(user) == whole
            weight = per_channel(other, along.number, len(whole), along.axis) if constant else None
            if weight is None:
                continue
            if not {*chain.steps} - {"bias"} and (step in along.folds or (along.folds and step in chain.steps)):
                return _folded(chain, step, user, weight)
            if name not in chain.weights:
                return chain.then(step, user, weights={**chain.weights, name: weight})
    return None


def _folded(chain: Chain, step: str, user: relax.Var, weight: np.ndarray) -> Chain:
    """Nothing but a bias came before: a step goes into the primitive's weights, a second bias into the first."""
    if step == "scale":
        scaled = {name: each * weight for name, each in chain.weights.items()}
        return replace(chain, result=user, weights=scaled, factor=chain.factor * weight, shift=chain.shift * weight)
    if "bias" in chain.steps:
        return replace(chain, result=user, weights={"b": chain.weights["b"] + weight})
    return replace(chain, result=user, shift=chain.shift + weight)


def _joined(graph: Graph, chain: Chain, along: _Channels) -> Chain | None:
    """Another tensor is added or multiplied by: as large as the result, or one number an image and channel."""
    whole = extents(chain.result)
    fitting = [whole, *([(*whole[:2], 1, 1)] if len(whole) == 4 and along.axis == 1 else [])]
    for word in ("add", "multiply"):
        for user, other in _combined(graph, chain.result, f"relax.{word}"):
            if isinstance(other, relax.Var) and extents(other) in fitting and extents(user) == whole:
                name = f"residual{len(chain.operands) or ''}"
                return chain.then(f"{word} {name}", user, operands={**chain.operands, name: other})
    return None


def _beside(graph: Graph, chain: Chain, along: _Channels) -> Chain | None:
    """The input and the result side by side, and nothing else."""
    users = graph.users(chain.result)
    call = graph.call(users[0]) if len(users) == 1 and chain.result not in graph.outputs else None
    if along.beside is None or call is None or call.op != tvm.ir.Op.get("relax.concat"):
        return None
    first, *others = call.args[0].fields
    along_channels = int(call.attrs.axis) % len(extents(chain.result)) == along.axis
    if not along_channels or len(others) != 1 or not first.same_as(along.beside):
        return None
    return chain.then(BESIDE, users[0])


def _combined(graph: Graph, var: relax.Var, op: str) -> Iterator[tuple[relax.Var, relax.Expr]]:
    """The only user of a value, if it combines it with another one: the user, and the other."""
    users = graph.users(var)
    call = graph.call(users[0]) if len(users) == 1 and var not in graph.outputs else None
    if call is not None and call.op == tvm.ir.Op.get(op):
        left, right = call.args
        if left.same_as(var) != right.same_as(var):
            yield users[0], right if left.same_as(var) else left


# Activations ------------------------------------------------------------------


class _Patterns(Graphs):
    """Formulas as patterns over the graph, and the numbers that must stand in a match."""

    def __init__(self) -> None:
        self.root = ""  # the operator that was written last: the value's
        self.numbers: list[tuple[DFPattern, float]] = []
        self.fields: list[tuple[DFPattern, Callable[[relax.Call], list[float]], list[float | _Parameter]]] = []

    def number(self, value: float, like: Any) -> DFPattern:
        self.numbers.append((is_const(), value))
        return self.numbers[-1][0]

    def binary(self, name: str, a: Any, b: Any) -> DFPattern:
        return self.operator(name, [a, b], {})

    def unary(self, name: str, a: Any) -> DFPattern:
        return self.operator(name, [a], {})

    def operator(self, name: str, operands: list[Any], attrs: dict[str, Any]) -> DFPattern:
        self.root = f"relax.{name}"
        pattern = is_op(self.root)(*operands)
        self.fields += [(pattern, partial(_attribute, each), [wanted]) for each, wanted in attrs.items()]
        return pattern

    def clip(self, value: Any, low: Any, high: Any) -> DFPattern:
        pattern = self.operator("clip", [value, wildcard(), wildcard()], {})
        self.fields.append((pattern, _bounds, [low, high]))
        return pattern

    def read(self, matched: Any) -> dict[_Parameter, float] | None:
        """What stands in a match for the formula's parameters; None where its other numbers differ."""
        if not all(np.all(np.float32(value) == array(matched[each])) for each, value in self.numbers):
            return None
        found: dict[_Parameter, float] = {}
        for pattern, numbers, wanted in self.fields:
            for number, want in zip(numbers(matched[pattern]), wanted, strict=True):
                if isinstance(want, _Parameter):
                    found[want] = number
                elif number != want:
                    return None
        return found


@dataclass(frozen=True)
class _Parameter:
    """A number that an activation has of its own, such as a slope, where it stands in a form."""

    index: int


def _attribute(name: str, call: relax.Call) -> list[float]:
    return [float(getattr(call.attrs, name))]


def _bounds(clip: relax.Call) -> list[float]:
    return [float(getattr(bound, "value", bound)) for bound in clip.args[1:]]


class _Form(NamedTuple):
    """A way to write an activation."""

    row: Activation
    x: DFPattern
    value: DFPattern
    arithmetic: _Patterns

    def step(self, graph: Graph, var: relax.Var, last: relax.Var) -> str | None:
        """The activation, if that is what is computed from one variable to the other."""
        matched = self.value.extract_matched_expr(graph.values[last], graph.values)
        if matched is None or not graph.variable(matched[self.x]).same_as(var):
            return None
        numbers = self.arithmetic.read(matched)
        if numbers is None:
            return None
        return replace(self.row, numbers=tuple(numbers[_Parameter(i)] for i in range(len(self.row.numbers)))).step


@cache
def _forms() -> dict[str, list[_Form]]:
    """Every way to write an activation, by the operator that gives its value."""
    found: dict[str, list[_Form]] = {}
    for row in ACTIVATIONS.values():
        for form in row.graphs:
            arithmetic, x = _Patterns(), wildcard()
            value = form(GraphValue(arithmetic, x), *map(_Parameter, range(len(row.numbers)))).raw
            found.setdefault(arithmetic.root, []).append(_Form(row, x, value, arithmetic))
    return found


def _activated(graph: Graph, var: relax.Var) -> tuple[str, relax.Var] | None:
    """The activation that all users of a value belong to, and the variable that has its value."""
    if var in graph.outputs:
        return None
    for last in _behind(graph, var):
        forms = _forms().get(getattr(graph.values[last].op, "name", ""), ())
        step = next(filter(None, (form.step(graph, var, last) for form in forms)), None)
        if step is not None and _is_all(graph, var, last):
            return step, last
    return None


def _is_all(graph: Graph, var: relax.Var, last: relax.Var) -> bool:
    """Whether nothing else is computed from a value, nor from what lies between it and the last one."""
    inner = graph.between([var], last)
    return inner is not None and all(user in inner or user.same_as(last) for user in graph.users(var))


def _behind(graph: Graph, var: relax.Var) -> list[relax.Var]:
    """What is computed from a value in a few steps, the nearest first."""
    found: list[relax.Var] = []
    nearest = [var]
    for _ in range(APART):
        users = dict.fromkeys(user for each in nearest for user in graph.users(each))
        nearest = [user for user in users if graph.call(user) is not None and user not in found]
        found += nearest
    return found
