"""Does a library compute what PyTorch computes? The inputs and the measure, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saevit_tvm.runtime.tensors import Inputs, TensorSpec, drawn
from saevit_tvm.support.errors import ParityError

INPUTS = 3
SEED = 20240229
RECORDED_VALUES = 4096  # of each output, spread evenly

Outputs = list[np.ndarray]


@dataclass(frozen=True)
class Deviation:
    """The worst over all inputs and outputs."""

    max_abs_error: float
    max_rel_error: float

    def within(self, tolerance: float) -> bool:
        return self.max_rel_error <= tolerance


def random_inputs(specs: Sequence[TensorSpec], count: int = INPUTS, seed: int = SEED) -> list[Inputs]:
    """Inputs for some inferences, the same on every machine."""
    stream = np.random.RandomState(seed)
    return [drawn(specs, stream) for _ in range(count)]


def as_list(outputs: Any) -> Outputs:
    """What an engine answers, one array or several, as a list."""
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def deviation(ours: Sequence[Outputs], reference: Sequence[Outputs]) -> Deviation:
    """How far `ours` is from `reference`, both one list of outputs per input."""
    worst_abs = worst_rel = 0.0
    for answer, expected in zip(ours, reference, strict=True):
        if [a.shape for a in answer] != [e.shape for e in expected]:
            raise ParityError(
                f"the library's outputs have shapes {[a.shape for a in answer]} and PyTorch's have "
                f"{[e.shape for e in expected]}: build it again."
            )
        for a, e in zip(answer, expected, strict=True):
            if not np.isfinite(e).all():
                raise ParityError(
                    "PyTorch itself answers NaN or infinity, so nothing can be compared: check the weights."
                )
            error = np.abs(a.astype(np.float64) - e.astype(np.float64)).max()
            error = float(error) if np.isfinite(error) else float("inf")
            worst_abs = max(worst_abs, error)
            worst_rel = max(worst_rel, error / (float(np.abs(e).max()) or 1.0))  # shares, say, are all small
    return Deviation(worst_abs, worst_rel)


def sample(outputs: Outputs) -> Outputs:
    """The positions of each output that a manifest records."""
    return [flat[_positions(flat.size)] for flat in (np.ascontiguousarray(o).reshape(-1) for o in outputs)]


def _positions(size: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, RECORDED_VALUES)).astype(np.int64))


def record(expected: Sequence[Outputs], count: int = 1) -> dict[str, Any]:
    """What a manifest keeps of PyTorch's answers, for where PyTorch or the weights are not at hand."""
    # The shortest decimal that is this float32 again.
    values = [[[float(str(v)) for v in flat] for flat in sample(outputs)] for outputs in expected[:count]]
    return {"seed": SEED, "n": count, "values_per_output": RECORDED_VALUES, "outputs": values}


def recorded(reference: dict[str, Any]) -> list[Outputs]:
    """The same, read back."""
    return [[np.asarray(flat, np.float32) for flat in outputs] for outputs in reference["outputs"]]
