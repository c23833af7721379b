"""The search space of declared kernels, and how the cost model sees them.

A declaration has no loops, so MetaSchedule's rules have nothing to work on: its space is the tilings that its
generator offers, and its features are the numbers of the tiling and of the shape.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.feature_extractor import PerStoreFeature, PyFeatureExtractor

from saevit_tvm import backends
from schedules.kernels import declared, noted

if TYPE_CHECKING:
    from saevit_tvm.compiler.street import TunableKernel
    from saevit_tvm.targets import Target


def space_for(kernel: TunableKernel, target: Target) -> Any | None:
    """The tilings of a declared kernel; None for any other, which has MetaSchedule's own space."""
    return backends.get(target.kind).space(kernel.module, target.tvm)


@derived_object
class Features(PyFeatureExtractor):
    """One vector a buffer store, as MetaSchedule has it, or one vector a tiling."""

    def __init__(self) -> None:
        super().__init__()
        self.stores = PerStoreFeature(extract_workload=True)

    def extract_from(self, context: Any, candidates: list[Any]) -> list[Any]:
        if declared(context.mod["main"]) is None:
            return list(self.stores.extract_from(context, candidates))
        length = int(self.stores.feature_vector_length)
        return [tvm.runtime.tensor(_vector(candidate.sch.mod["main"], length)) for candidate in candidates]


def _vector(func: tvm.tirx.PrimFunc, length: int) -> np.ndarray:
    """Spec and tiling, as logarithms because they multiply, in a row as long as the other kernels' are."""
    spec = declared(func)
    assert spec is not None
    numbers = [*spec.numbers, *(value for _, value in sorted((noted(func) or {}).items()))]
    row = np.zeros((1, length), "float64")
    row[0, : len(numbers)] = [math.log2(1 + abs(number)) for number in numbers[:length]]
    return row
