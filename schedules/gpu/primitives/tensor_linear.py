"""Linear layers and products of two values on tensor cores: tokens by output channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from schedules.dtypes import DTYPES, stored_as
from schedules.gpu.epilogue import Results
from schedules.gpu.launch import Limits, Memory
from schedules.gpu.primitives.linear import Layer, Linear
from schedules.gpu.primitives.tensor import Body, OnTensorCores, Staging, Tiling, widest


@dataclass(frozen=True)
class TensorLinear(OnTensorCores, Layer):
    """One in an arithmetic that tensor cores have."""

    NAME = "tensor_linear"

    @property
    def all_rows(self) -> int:
        return self.count

    @property
    def depth(self) -> int:
        return self.c

    @property
    def all_columns(self) -> int:
        return self.k

    @property
    def batch(self) -> int:
        return math.prod(self.items)

    def body(self, tiling: Tiling, memory: Memory) -> _Body:
        return _Body(self, tiling, memory)


@dataclass(frozen=True)
class _Body(Body):
    of: TensorLinear

    beside = True

    @property
    def left(self) -> Staging:
        """Tokens, by token and term."""
        alike = self.of.given == self.narrow
        lanes = widest(self.of.c, DTYPES[self.narrow].bytes) if alike else 1
        return Staging(self.tiling.terms, self.tiling.tall, lanes, self.items)

    @property
    def right(self) -> Staging:
        """Weights, by term and output channel."""
        lanes = widest(self.of.k, DTYPES[self.narrow].bytes)
        return Staging(self.tiling.broad, self.tiling.terms, lanes, self.items)

    @property
    def lanes(self) -> int:
        return widest(self.of.k, DTYPES["float32"].bytes)

    def fetch(self, step: str) -> list[str]:
        of, left, right = self.of, self.left, self.right
        first = f"{step} * {self.tiling.terms}"
        token, term = f"({self.first_row} + {left.row})", f"({first} + {left.at})"
        tokens = self.brought(
            *("next_left", left, "x", f"{of.within(token, of.count)} * {of.c} + {term}"),
            f"{token} < {of.count} and {term} < {of.c}",
        )
        term, channel = f"({first} + {right.row})", self.column(right.at)
        weights = self.brought(
            *("next_right", right, "w", f"{of.within(term, of.c)} * {of.k} + {channel}"),
            f"{term} < {of.c} and {channel} < {of.k}",
        )
        return [tokens, weights]

    def finished(self, sums: str, row: str, place: str) -> str:
        column = self.column(place)
        target = f"{self.of.within(row, self.of.count)} * {self.of.k} + {column}"
        results = Results(self.memory, self.lanes, "result[v]", f"{column} + v", target)
        found = [self.each_lane(f"result[v] = {sums}"), *results.through(self.of.epilogue.steps)]
        return "\n".join([*found, self.memory.store_lanes("out", target, "result", "0", self.lanes)])


def linear(limits: Limits, **shape: Any) -> Layer:
    """The kernel of a layer: on tensor cores where that pays, else the one that every device can run."""
    kernel = TensorLinear(**shape)
    return kernel if kernel.pays(limits) else Linear(**shape | {"dtype": stored_as(kernel.dtype)})
