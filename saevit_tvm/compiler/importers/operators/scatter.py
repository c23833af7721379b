"""Writing along an axis at computed places: every place looks for the last that was written to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, dtype, shape

OPERATORS = ("scatter.src", "scatter.value")


def convert(node: Any, op: Emitter) -> relax.Expr:
    given = arguments(node, op)
    x, index = given["self"], given["index"]
    axis, kind = given["dim"] % len(shape(x)), dtype(index)
    others = [at for at in range(len(shape(x))) if at != axis]
    if any(shape(index)[at] != shape(x)[at] for at in others):
        raise ValueError("scatter writes to a part of the other axes only")
    rank, count, length = len(shape(x)), shape(index)[axis], shape(x)[axis]
    # [.., place, write, ..]
    apart = (*([1] * axis), length, *([1] * (rank - axis)))
    there = op.equal(op.expand_dims(index, axis), relax.const(np.arange(length).reshape(apart).astype(kind), kind))
    writes = np.arange(count).reshape(*([1] * (axis + 1)), count, *([1] * (rank - axis - 1))).astype("int64")
    none = relax.const(-1, "int64")
    last = op.max(op.where(there, relax.const(writes, "int64"), none), axis + 1)
    written = op.greater(last, none)
    if "src" in given:
        begins = op.strided_slice(given["src"], list(range(rank)), [0] * rank, list(shape(index)))
        source = begins if shape(index) != shape(given["src"]) else given["src"]
        place = op.maximum(last, relax.const(0, "int64"))
        value = op.gather_elements(source, place, axis=axis)
    else:
        value = relax.const(given["value"], dtype(x))
    return op.where(written, value, x)
