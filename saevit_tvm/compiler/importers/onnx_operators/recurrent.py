"""Recurrent layers, step by step: their lengths are known, so all steps are written one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, shape

OPERATORS = ("GRU", "LSTM", "RNN")
LONGEST = 512  # steps
USUAL = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "RNN": ["Tanh"]}
# By the number of gates, which is what tells these layers apart.
KINDS = {3: "GRU", 4: "LSTM", 1: "RNN"}
State = tuple[relax.Expr, ...]
# By name: the numbers that a function has where the layer gives none, if it has any, and what it is.
FUNCTIONS: dict[str, tuple[tuple[float | None, ...], Callable[..., relax.Expr]]] = {
    "Affine": ((None, None), lambda op, x, a, b: op.add(op.multiply(x, a), b)),
    "Elu": ((1.0,), lambda op, x, a: op.where(_above(op, x), x, op.multiply(a, op.subtract(op.exp(x), _one(x))))),
    "HardSigmoid": ((0.2, 0.5), lambda op, x, a, b: op.clip(op.add(op.multiply(x, a), b), 0.0, 1.0)),
    "LeakyRelu": ((0.01,), lambda op, x, a: op.where(_above(op, x), x, op.multiply(x, a))),
    "Relu": ((), lambda op, x: op.nn.relu(x)),
    "ScaledTanh": ((None, None), lambda op, x, a, b: op.multiply(a, op.tanh(op.multiply(x, b)))),
    "Sigmoid": ((), lambda op, x: op.sigmoid(x)),
    "Softplus": ((), lambda op, x: op.nn.softplus(x)),
    "Softsign": ((), lambda op, x: op.divide(x, op.add(_one(x), op.abs(x)))),
    "Tanh": ((), lambda op, x: op.tanh(x)),
    "ThresholdedRelu": ((None,), lambda op, x, a: op.where(op.greater(x, a), x, relax.const(0.0, dtype(x)))),
}


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    batch_first = attributes.get("layout", 0) == 1
    x = op.permute_dims(inputs[0], [1, 0, 2]) if batch_first else inputs[0]
    if shape(x)[0] > LONGEST:
        raise ValueError(f"a recurrent layer of {shape(x)[0]} steps is more than the {LONGEST} that are written out")
    directions = shape(inputs[1])[0]
    ways = [_Way(op, x, inputs, attributes, which, batch_first).run() for which in range(directions)]
    outputs = _side_by_side(op, [steps for steps, _ in ways], 1)  # [steps, directions, batch, hidden]
    last = [_side_by_side(op, [each[at] for _, each in ways], 0) for at in range(len(ways[0][1]))]
    if batch_first:
        outputs = op.permute_dims(outputs, [2, 0, 1, 3])
        last = [op.permute_dims(each, [1, 0, 2]) for each in last]
    return op.tuple(outputs, *last)


def _one(x: relax.Expr) -> relax.Expr:
    return relax.const(1.0, dtype(x))


def _above(op: Emitter, x: relax.Expr) -> relax.Expr:
    return op.greater_equal(x, relax.const(0.0, dtype(x)))


def _side_by_side(op: Emitter, tensors: list[relax.Expr], axis: int) -> relax.Expr:
    """On a new axis. TVM has an operator for it, which its change of layouts cannot bear."""
    return op.concat([op.expand_dims(each, axis) for each in tensors], axis)


class _Way:
    """One direction of a layer."""

    def __init__(
        self, op: Emitter, x: relax.Expr, inputs: Any, attributes: dict[str, Any], which: int, batch_first: bool
    ) -> None:
        self.op, self.attributes = op, attributes
        self.hidden = shape(inputs[2])[2]
        self.gates = shape(inputs[1])[1] // self.hidden
        self.kind = KINDS[self.gates]
        self.backward = attributes.get("direction", b"forward") == b"reverse" or which == 1
        named = [each.decode() for each in attributes.get("activations", [])] or USUAL[self.kind] * 2
        numbers = [iter(attributes.get(f"activation_{name}", ())) for name in ("alpha", "beta")]
        functions = [self._function(each, *numbers) for each in named]
        count = len(USUAL[self.kind])
        self.functions = functions[which * count :][:count]

        def mine(at: int) -> relax.Expr | None:
            value = inputs[at]
            return None if value is None else op.squeeze(op.strided_slice(value, [0], [which], [which + 1]), [0])

        def state(at: int) -> relax.Expr:
            if inputs[at] is None:
                return relax.const(np.zeros((shape(x)[1], self.hidden)), dtype(x))
            value = op.permute_dims(inputs[at], [1, 0, 2]) if batch_first else inputs[at]
            return op.squeeze(op.strided_slice(value, [0], [which], [which + 1]), [0])

        self.x, self.lengths = x, inputs[4]
        self.weight, self.recurrence, self.bias = (mine(at) for at in (1, 2, 3))
        self.first: State = (state(5), state(6)) if self.kind == "LSTM" else (state(5),)
        self.peepholes = mine(7) if self.kind == "LSTM" else None

    def run(self) -> tuple[relax.Expr, State]:
        """What is given at every step, and the last state."""
        op, steps = self.op, shape(self.x)[0]
        taken = op.matmul(self.x, op.permute_dims(self.weight, [1, 0]))
        if self.bias is not None:
            taken = op.add(taken, self._part(self.bias, 0, self.gates))
        state, given = self.first, {}
        for at in reversed(range(steps)) if self.backward else range(steps):
            one = op.squeeze(op.strided_slice(taken, [0], [at], [at + 1]), [0])
            new = getattr(self, f"_{self.kind.lower()}")(one, *state)
            given[at] = new[0]
            if self.lengths is not None:  # behind its end a sequence keeps its state, and gives zeros
                alive = op.less(relax.const(at, dtype(self.lengths)), op.reshape(self.lengths, [-1, 1]))
                given[at] = op.where(alive, new[0], relax.const(0, dtype(self.x)))
                new = tuple(op.where(alive, a, b) for a, b in zip(new, state, strict=True))
            state = new
        return _side_by_side(op, [given[at] for at in range(steps)], 0), state

    def _part(self, x: relax.Expr, begin: int, end: int) -> relax.Expr:
        """Some gates of what all of them stand in, side by side."""
        axis = len(shape(x)) - 1
        return self.op.strided_slice(x, [axis], [begin * self.hidden], [end * self.hidden])

    def _remembered(self, hidden: relax.Expr, begin: int = 0, end: int | None = None) -> relax.Expr:
        """What some gates make of the state."""
        op, end = self.op, self.gates if end is None else end
        rows = op.strided_slice(self.recurrence, [0], [begin * self.hidden], [end * self.hidden])
        found = op.matmul(hidden, op.permute_dims(rows, [1, 0]))
        if self.bias is None:
            return found
        return op.add(found, self._part(self.bias, self.gates + begin, self.gates + end))

    def _function(self, name: str, alphas: Iterator[float], betas: Iterator[float]) -> Callable[..., relax.Expr]:
        """Each takes of the layer's numbers as many as it has, in their order."""
        if name not in FUNCTIONS:
            raise ValueError(f"a recurrent layer with {name} has no rule")
        op, bound, (usual, rule) = self.op, self.attributes.get("clip"), FUNCTIONS[name]
        numbers = [next(given, number) for given, number in zip((alphas, betas), usual, strict=False)]
        if None in numbers:
            raise ValueError(f"a recurrent layer with {name} says no numbers for it")

        def function(x: relax.Expr) -> relax.Expr:
            x = op.clip(x, -float(bound), float(bound)) if bound else x
            return rule(op, x, *(relax.const(number, dtype(x)) for number in numbers))

        return function

    def _rnn(self, x: relax.Expr, hidden: relax.Expr) -> State:
        return (self.functions[0](self.op.add(x, self._remembered(hidden))),)

    def _gru(self, x: relax.Expr, hidden: relax.Expr) -> State:
        op, (gate, function) = self.op, self.functions
        both = gate(op.add(self._part(x, 0, 2), self._remembered(hidden, 0, 2)))
        update, reset = self._part(both, 0, 1), self._part(both, 1, 2)
        if self.attributes.get("linear_before_reset"):
            past = op.multiply(reset, self._remembered(hidden, 2, 3))
        else:
            past = self._remembered(op.multiply(reset, hidden), 2, 3)
        new = function(op.add(self._part(x, 2, 3), past))
        return (op.add(new, op.multiply(update, op.subtract(hidden, new))),)

    def _lstm(self, x: relax.Expr, hidden: relax.Expr, cell: relax.Expr) -> State:
        op, (gate, function, last) = self.op, self.functions
        total = op.add(x, self._remembered(hidden))
        into, out, forget, new = (self._part(total, at, at + 1) for at in range(4))

        def seen(value: relax.Expr, what: relax.Expr, at: int) -> relax.Expr:
            """A gate that looks at the cell, too."""
            if self.peepholes is None:
                return gate(value)
            return gate(op.add(value, op.multiply(what, self._part(self.peepholes, at, at + 1))))

        share = seen(into, cell, 0)
        coupled = self.attributes.get("input_forget")
        left = op.subtract(relax.const(1.0, dtype(x)), share) if coupled else seen(forget, cell, 2)
        cell = op.add(op.multiply(left, cell), op.multiply(share, function(new)))
        return op.multiply(seen(out, cell, 1), last(cell)), cell
