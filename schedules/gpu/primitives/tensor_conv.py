"""Convolutions on tensor cores: weights by positions.

The positions of all images of a batch are the columns of one matrix, so neither the batch nor the size of an image
has to be a multiple of anything. The terms are the input channels of every tap of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schedules.dtypes import DTYPES, stored_as
from schedules.gpu.epilogue import Results, split
from schedules.gpu.launch import BARRIER, Limits, Memory
from schedules.gpu.primitives.conv import Conv, Convolution
from schedules.gpu.primitives.dots import Dots
from schedules.gpu.primitives.tensor import Body, OnTensorCores, Staging, Tiling, widest


@dataclass(frozen=True)
class TensorConv(OnTensorCores, Convolution):
    """One in an arithmetic that tensor cores have."""

    NAME = "tensor_conv"

    @property
    def all_rows(self) -> int:
        return self.k

    @property
    def depth(self) -> int:
        return self.taps * self.c

    @property
    def all_columns(self) -> int:
        return self.n * self.positions

    def pays(self, limits: Limits) -> bool:
        """Of groups, each would be a product of its own."""
        return self.groups == 1 and super().pays(limits)

    def body(self, tiling: Tiling, memory: Memory) -> _Body:
        return _Body(self, tiling, memory)


@dataclass(frozen=True)
class _Body(Body):
    of: TensorConv

    @property
    def left(self) -> Staging:
        """Weights, by term and output channel."""
        lanes = widest(self.of.k, DTYPES[self.narrow].bytes)
        return Staging(self.tiling.tall, self.tiling.terms, lanes, self.items)

    @property
    def right(self) -> Staging:
        """Inputs, by term and position."""
        alike = self.of.pointwise and self.of.given == self.narrow
        lanes = widest(self.of.positions, DTYPES[self.narrow].bytes) if alike else 1
        return Staging(self.tiling.broad, self.tiling.terms, lanes, self.items)

    @property
    def lanes(self) -> int:
        return widest(self.of.positions, DTYPES["float32"].bytes)

    def fetch(self, step: str) -> list[str]:
        conv, left = self.of, self.left
        term, channel = f"({step} * {self.tiling.terms} + {left.row})", f"({self.first_row} + {left.at})"
        inside = f"{term} < {conv.depth} and {channel} < {conv.k}"
        return [
            self.brought("next_left", left, "w", f"{term} * {conv.k} + {channel}", inside),
            self._fetch_inputs(step),
        ]

    def _fetch_inputs(self, step: str) -> str:
        conv, right = self.of, self.right
        term = f"({step} * {self.tiling.terms} + {right.row})"
        column = self.column(right.at)
        image, position = f"({column} // {conv.positions})", f"({column} % {conv.positions})"
        plane, inside = f"({image} * {conv.c} + {term})", ""
        if not conv.pointwise:
            plane = f"({image} * {conv.c} + {term} % {conv.c})"
            position, inside = self._tapped(f"({term} // {conv.c})", position)
        index = f"{plane} * {conv.h * conv.w} + {position}"
        inside = f"{term} < {conv.depth} and {column} < {conv.all_columns}{inside}"
        return self.brought("next_right", right, "x", index, inside)

    def _tapped(self, tap: str, position: str) -> tuple[str, str]:
        """Where in the input plane a tap of the kernel reads for a position of the output, and what must hold."""
        conv = self.of
        (down, across), (apart, beside), (above, left, _, _) = conv.strides, conv.dilation, conv.padding
        y = f"({position} // {conv.width} * {down} + {tap} // {conv.kernel[1]} * {apart} - {above})"
        x = f"({position} % {conv.width} * {across} + {tap} % {conv.kernel[1]} * {beside} - {left})"
        inside = f" and {y} >= 0 and {y} < {conv.h} and {x} >= 0 and {x} < {conv.w}" if any(conv.padding) else ""
        return f"{y} * {conv.w} + {x}", inside

    def finished(self, sums: str, row: str, place: str) -> str:
        """With the rank-one term, which joins the sums with the bias."""
        conv, lanes, column, found = self.of, self.lanes, self.column(place), []
        plane = f"{column} // {conv.positions} * {conv.k} + {row}"
        target = f"({plane}) * {conv.positions} + {column} % {conv.positions}"
        results = Results(self.memory, lanes, "result[v]", row, target, plane)
        biased, *others = split(conv.epilogue)
        value = f"{sums} + {results.bias}" if biased else sums
        if conv.common:
            found.append(self.each_lane(f"more[v] = near_common[{place} + v]"))
        elif conv.rank_one:
            found.append(self.memory.load_lanes("more", "0", "by_position", column, lanes))
        if conv.rank_one:
            value += f" - more[v] * by_channel[{row}]"
        found.append(self.each_lane(f"result[v] = {value}"))
        for steps in others:
            found += results.through(steps)
        found.append(self.memory.store_lanes("out", target, "result", "0", lanes))
        return "\n".join(found)

    # The common part of the rank-one term ------------------------------

    @property
    def _dots(self) -> Dots:
        tiling = self.tiling
        return Dots(self.of.depth, tiling.terms, self.right.stride, tiling.broad, self.items)

    @property
    def private(self) -> Mapping[str, int]:
        return self._dots.private if self.of.common else {}

    @property
    def shared(self) -> Mapping[str, int]:
        return self._dots.shared if self.of.common else {}

    def before(self) -> list[str]:
        return [self._dots.cleared()] if self.of.common else []

    def beside_products(self) -> list[str]:
        return [self._dots.added("io")] if self.of.common else []

    def after(self) -> list[str]:
        return self._dots.finished(BARRIER) if self.of.common else []


def convolution(limits: Limits, **shape: Any) -> Convolution:
    """The kernel of a convolution: on tensor cores where that pays, else the one that every device can run."""
    kernel = TensorConv(**shape)
    return kernel if kernel.pays(limits) else Conv(**shape | {"dtype": stored_as(kernel.dtype)})
