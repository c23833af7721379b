"""Does a library compute what PyTorch computes? The inputs and the measure, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saevit_tvm.runtime.tensors import Inputs, TensorSpec, drawn
from saevit_tvm.support.errors import ParityError
from schedules.dtypes import MOST_MOVES, TOLERANCE

INPUTS = 3
SEED = 20240229
RECORDED_VALUES = 4096  # of each output, spread evenly

Outputs = list[np.ndarray]


FLIPS = 10  # times the tolerance: the share of decisions that rounding may turn


@dataclass(frozen=True)
class Deviation:
    """The worst over all inputs and outputs, and how many decisions (numbers that are whole) came out otherwise.

    Where numbers deviate by a share of their range, about as many decisions between them fall on the other side. So
    a few of very many may; of a hundred classes none.
    """

    max_abs_error: float
    max_rel_error: float
    decisions: int = 0
    flipped: int = 0

    def within(self, tolerance: float) -> bool:
        return self.max_rel_error <= tolerance and self.flipped <= FLIPS * tolerance * self.decisions

    @property
    def is_none(self) -> bool:
        return self.max_abs_error == 0 and self.flipped == 0

    @property
    def entries(self) -> dict[str, Any]:
        """The same in a manifest."""
        counted = {"decisions": self.decisions, "flipped": self.flipped} if self.decisions else {}
        return {"max_abs_error": self.max_abs_error, "max_rel_error": self.max_rel_error, **counted}

    def __str__(self) -> str:
        flipped = f", and {self.flipped} of {self.decisions} decisions are others" if self.decisions else ""
        return f"{self.max_abs_error:.3g} ({self.max_rel_error:.3g} of the largest value{flipped})"


def allowed(manifest: Mapping[str, Any], dtype: str | None = None) -> float:
    """How far an answer computed in a type, the artifact's or another, may deviate from the original's.

    An original that stores numbers in few bits moves by more when its input moves by as little; what else a file says
    of that counts for nothing.
    """
    moves = manifest["verification"].get("original_moves")
    moves = moves if isinstance(moves, float) and 0 <= moves <= MOST_MOVES else 0.0
    return max(TOLERANCE[dtype or manifest["dtype"]], moves)


def random_inputs(specs: Sequence[TensorSpec], count: int = INPUTS, seed: int = SEED) -> list[Inputs]:
    """Inputs for some inferences, the same on every machine."""
    stream = np.random.RandomState(seed)
    return [drawn(specs, stream) for _ in range(count)]


def with_smaller(
    inputs: list[Inputs], expected: list[Outputs], batches: Sequence[int]
) -> tuple[list[Inputs], list[Outputs]]:
    """One more inference for each smaller batch: the first pictures, of which the same is expected as before."""
    given = [tuple(array[:batch] for array in inputs[0]) for batch in batches]
    return [*inputs, *given], [*expected, *([output[:batch] for output in expected[0]] for batch in batches)]


def as_list(outputs: Any) -> Outputs:
    """What an engine answers, one array or several, as a list."""
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def deviation(ours: Sequence[Outputs], reference: Sequence[Outputs]) -> Deviation:
    """How far `ours` is from `reference`, both one list of outputs per input."""
    worst_abs = worst_rel = 0.0
    decisions = flipped = 0
    for answer, expected in zip(ours, reference, strict=True):
        if (found := _described(answer)) != (wanted := _described(expected)):
            raise ParityError(f"the library's outputs are {found} and PyTorch's are {wanted}: build it again.")
        for a, e in zip(answer, expected, strict=True):
            if e.dtype.kind != "f":
                decisions, flipped = decisions + e.size, flipped + int(np.count_nonzero(a != e))
                continue
            if not np.isfinite(e).all():
                raise ParityError(
                    "PyTorch itself answers NaN or infinity, so nothing can be compared: check the weights."
                )
            error = float(_errors(a, e).max())
            error = error if np.isfinite(error) else float("inf")
            worst_abs = max(worst_abs, error)
            worst_rel = max(worst_rel, error / (float(np.abs(e).max()) or 1.0))  # shares, say, are all small
    return Deviation(worst_abs, worst_rel, decisions, flipped)


def _errors(answer: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Between numbers of sixteen bits one step counts as none: the same sum a little larger is rounded to the next."""
    errors = np.abs(answer.astype(np.float64) - expected.astype(np.float64))
    if expected.dtype != np.float16:
        return errors
    return np.where(errors > np.spacing(np.abs(expected)).astype(np.float64), errors, errors * 0)


def _described(outputs: Outputs) -> str:
    return ", ".join(f"{output.dtype} of {output.shape}" for output in outputs)


def sample(outputs: Outputs) -> Outputs:
    """The positions of each output that a manifest records."""
    return [flat[_positions(flat.size)] for flat in (np.ascontiguousarray(o).reshape(-1) for o in outputs)]


def _positions(size: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, RECORDED_VALUES)).astype(np.int64))


def record(expected: Sequence[Outputs], count: int = 1) -> dict[str, Any]:
    """What a manifest keeps of PyTorch's answers, for where PyTorch or the weights are not at hand."""
    values = [[_written(flat) for flat in sample(outputs)] for outputs in expected[:count]]
    return {"seed": SEED, "n": count, "values_per_output": RECORDED_VALUES, "outputs": values}


def _written(flat: np.ndarray) -> list[Any]:
    """Numbers as JSON has them: the shortest decimals that are these floats again."""
    return [float(str(v)) for v in flat] if flat.dtype.kind == "f" else flat.tolist()


def recorded(manifest: Mapping[str, Any]) -> list[Outputs]:
    """The same, read back."""
    dtypes = [output["dtype"] for output in manifest["outputs"]]
    return [
        [np.asarray(flat, dtype) for flat, dtype in zip(outputs, dtypes, strict=True)]
        for outputs in manifest["reference"]["outputs"]
    ]
