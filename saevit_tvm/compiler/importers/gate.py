"""An importer's mistake is not shipped: what was imported is computed here, and compared with the original.

It costs about one inference in PyTorch, so it is done for every target, whether its library can be run here or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import tvm

from saevit_tvm.compiler.importers.evaluate import evaluate, variables
from saevit_tvm.runtime.tensors import Inputs, drawn
from saevit_tvm.support.errors import ParityError

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource

NEAR = 1e-4  # what rounding alone makes of a number, at most
TOLERANCE = 1e-3  # of the largest value: mistakes are larger, and rounding that is added up is smaller


class Step(NamedTuple):
    """One operator of the original: its name, where it stands in the source, and what it gives."""

    operator: str
    place: str
    variable: str  # that has it in the imported graph
    expected: np.ndarray


class Imported(NamedTuple):
    """A graph, and the steps of the original on an input, in order."""

    mod: tvm.IRModule
    steps: Callable[[Inputs], Iterable[Step]]


def check(source: ModelSource, imported: Imported) -> None:
    inputs = drawn(source.inputs, np.random.RandomState(0))
    expected = source.original(*inputs)
    pairs = list(zip(evaluate(imported.mod, inputs), expected, strict=True))
    if all(_alike(a, e) for a, e in pairs):
        return
    moves = source.moves(inputs, NEAR)
    if moves and all(_alike(a, e, moves) for a, e in pairs):
        return
    named = variables(imported.mod, inputs)
    first = next((step for step in imported.steps(inputs) if _differs(named.get(step.variable), step.expected)), None)
    what = "it computes something else" if first is None else f"'{first.operator}' computes something else{first.place}"
    remedy = source.remedy or "replace that part of the model"
    raise ParityError(f"TVM imports {source.name} wrongly: {what}. Nothing was built: {remedy}.")


def _differs(value: Any, expected: np.ndarray) -> bool:
    return isinstance(value, torch.Tensor) and not _alike(value.numpy(), expected)


def _alike(a: np.ndarray, e: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    """NaN is alike to NaN and infinity to infinity, too; of many decisions a few may fall on the other side."""
    if (a.shape, a.dtype) != (e.shape, e.dtype):
        return False
    if e.dtype.kind != "f":
        return int(np.count_nonzero(a != e)) <= tolerance * e.size
    a, e = a.astype(np.float64), e.astype(np.float64)
    largest = np.abs(e[np.isfinite(e)]).max(initial=0.0)
    return bool(np.allclose(a, e, rtol=0, atol=tolerance * largest, equal_nan=True))
