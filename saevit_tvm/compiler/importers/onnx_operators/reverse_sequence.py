"""Sequences in one tensor, each turned round up to its own length."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, shape

OPERATORS = ("ReverseSequence",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    x, lengths = inputs[0], inputs[1]
    time, batch, extents = attributes.get("time_axis", 0), attributes.get("batch_axis", 1), shape(inputs[0])
    steps = relax.const(np.arange(extents[time]).reshape([-1, 1] if time < batch else [1, -1]), "int64")
    ends = op.reshape(op.astype(lengths, "int64"), [1, -1] if time < batch else [-1, 1])
    turned = op.subtract(op.subtract(ends, relax.const(1, "int64")), steps)
    place = op.where(op.less(steps, ends), turned, steps)
    wide = op.reshape(place, [*shape(place), *[1] * (len(extents) - 2)])
    return op.gather_elements(x, op.broadcast_to(wide, extents), axis=time)
