"""Kernels that make every row of a tensor of the same row of another: how the rows are divided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from schedules.cpu.builder import Builder, Expr, minimum
from schedules.cpu.primitives.unrolling import at_a_time

CACHED = 4096  # numbers of the rows that are worked on at a time: a part of a first-level cache


@dataclass(frozen=True)
class RowsShape:
    lead: tuple[int, ...]  # all extents but the last: together they are the rows
    c: int

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def whole(self) -> tuple[int, ...]:
        return *self.lead, self.c


@dataclass(frozen=True)
class Tiling:
    """`bands` tasks, `chunk` rows at a time."""

    bands: int
    chunk: int


def default(shape: RowsShape, threads: int) -> Tiling:
    bands = min(threads, shape.rows)
    return Tiling(bands, at_a_time(shape.rows, bands, max(8, CACHED // shape.c)))


def tilings(shape: RowsShape) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = default(shape, threads)
        most = shape.rows // start.bands
        for chunk in (start.chunk, -(-start.chunk // 2), min(2 * start.chunk, most), min(4 * start.chunk, most)):
            found[replace(start, chunk=chunk)] = None
    return list(found)


def in_bands(b: Builder, shape: RowsShape, tiling: Tiling, body: Callable[[Expr, int], None]) -> None:
    """body(first, count) for chunks of rows; the last one of a band is moved up to end where the band ends."""
    count = at_a_time(shape.rows, tiling.bands, tiling.chunk)
    with b.loop("task", tiling.bands, "parallel") as task:
        first = b.compute_once("first", task * shape.rows // tiling.bands)
        last = b.compute_once("last", (task + 1) * shape.rows // tiling.bands)
        with b.loop("chunk", (last - first + count - 1) // count) as index:
            body(b.compute_once("low", minimum(first + index * count, last - count)), count)
