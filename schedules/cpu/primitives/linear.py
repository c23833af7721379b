"""A linear layer over any number of rows, with its epilogue.

A task takes a band of the rows times a group of the columns, whichever way is more even. With many rows, the weights
of a panel stay in the cache while rows pass by; of deep rows only so many pass at a time that they stay there, too.
Few rows are as fast as their weights are read: wide tiles, each weight once, by all threads together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu import microkernel
from schedules.cpu.builder import Builder, Expr, minimum
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives import operands
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.unrolling import even, part
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec

FEW = 4  # rows whose product waits for the weights, not for multiply-adds
CACHED = 1 << 18  # numbers of the rows that pass at a time


@dataclass(frozen=True)
class LinearShape:
    lead: tuple[int, ...]  # all extents of x but the last: together they are the rows
    c: int
    k: int
    epilogue: Epilogue = field(default=Epilogue(("bias",)))

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def result(self) -> tuple[int, ...]:
        return *self.lead, self.k

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.c * self.k


@dataclass(frozen=True)
class Tiling:
    """`bands` x `groups` tasks (rows x columns), `chunk` rows at a time, and the register tile."""

    bands: int
    groups: int
    chunk: int
    rows: int
    vectors: int
    unroll: int


def _default(shape: LinearShape, isa: Isa, threads: int = 1) -> Tiling:
    """The best register tile for what a task has to do, which is fewer rows with more threads."""
    if shape.rows <= FEW:
        return _divided(shape, isa, _tiles(shape, isa)[0], threads)

    def cost(found: tuple[Tile, Tiling]) -> float:
        tile, tiling = found
        panels = -(-microkernel.panels(shape.k, tile, isa) // tiling.groups)
        columns = min(shape.k, panels * tile.vectors * isa.lanes)
        return microkernel.cost(isa, tile, -(-shape.rows // tiling.bands), columns)

    return min(((tile, _divided(shape, isa, tile, threads)) for tile in _tiles(shape, isa)), key=cost)[1]


def _tilings(shape: LinearShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads, tile in product((1, 2, 4, 8), _tiles(shape, isa)[:5]):
        start = _divided(shape, isa, tile, threads)
        most = -(-shape.rows // start.bands)
        chunks = {start.chunk, most, max(min(tile.rows, most), start.chunk // 2)}
        for chunk, unroll in product(sorted(chunks), (4, 8)):
            found[replace(start, chunk=chunk, unroll=unroll)] = None
    return list(found)


def _tiles(shape: LinearShape, isa: Isa) -> list[Tile]:
    """Register tiles, best first."""
    if shape.rows > FEW:
        return microkernel.tiles(isa, shape.rows, shape.k)
    widest = (isa.registers - 2 * shape.rows) // (shape.rows + 1)
    most = max(1, min(widest, 8, -(-shape.k // isa.lanes)))
    return [Tile(shape.rows, vectors) for vectors in range(most, 0, -1)]


def _divided(shape: LinearShape, isa: Isa, tile: Tile, threads: int) -> Tiling:
    """The most even division of the work; of equal ones, that which reads least."""
    panels = microkernel.panels(shape.k, tile, isa)

    def cost(bands: int) -> tuple[int, int]:
        groups = min(panels, threads // bands)
        longest = math.ceil(-(-shape.rows // bands) / tile.rows) * -(-panels // groups)
        return longest, bands * shape.c * shape.k + groups * shape.rows * shape.c

    divisors = [each for each in range(1, threads + 1) if threads % each == 0 and shape.rows // each >= tile.rows]
    bands = min(divisors or [1], key=cost)
    most = max(tile.rows, CACHED // shape.c)
    chunk = even(-(-shape.rows // bands), most)
    return Tiling(bands, min(panels, threads // bands), chunk, tile.rows, tile.vectors, 4)


class _Kernel:
    def __init__(self, shape: LinearShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        self.chunk = min(tiling.chunk, -(-shape.rows // tiling.bands))
        self.tile = Tile(min(tiling.rows, self.chunk), tiling.vectors, tiling.unroll)
        self.panels = microkernel.panels(shape.k, self.tile, isa)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        own = microkernel.pack(weights["w"], self.tile, self.isa)
        return [own, *operands.constants(self.shape.epilogue, weights)]

    def function(self) -> tirx.PrimFunc:
        shape, b, tiling = self.shape, self.b, self.tiling
        self.x = b.param("x", (*shape.lead, shape.c))
        self.ending = Ending(b, shape.epilogue, shape.result)
        self.weight = b.param("weight", (self.panels, shape.c, self.tile.vectors * self.isa.lanes))
        self.ending.declare_weights()
        self.out = b.param("out", shape.result)
        with b.loop("task", tiling.bands * tiling.groups, "parallel") as task:
            # Neighbouring tasks share the rows.
            band = b.compute_once("band", task // tiling.groups)
            group = b.compute_once("group", task % tiling.groups)
            first, size = part(b, band, shape.rows, tiling.bands)
            begin = b.compute_once("begin", group * self.panels // tiling.groups)
            end = b.compute_once("end", (group + 1) * self.panels // tiling.groups)
            with b.loop("chunk", -(-size // self.chunk)) as index:
                low = b.compute_once("low", first + minimum(index * self.chunk, size - self.chunk))
                self._multiplied(low, None if tiling.groups == 1 else (begin, end - begin))
        return b.function("linear")

    def _multiplied(self, low: Expr, some: tuple[Expr, Expr] | None) -> None:
        """A chunk of rows, from `low` on."""
        shape, b = self.shape, self.b

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            place = b.compute_once("place", (low + row) * shape.k + column)
            b.store(self.out, place, self.ending.done(value, Spot(place, column)))

        a = Rows(self.x, lambda row: (low + row) * shape.c, ((shape.c, 1),))
        rows = self.chunk
        microkernel.gemm(b, self.isa, self.tile, a, self.weight, rows, shape.k, finish, some, most=rows)


def _reference(shape: LinearShape, arrays: Arrays) -> np.ndarray:
    out = np.asarray(arrays["x"], np.float64) @ arrays["w"]
    return activations.reference(shape.epilogue.steps, out, dict(arrays))


class Linear(Generator):
    OP = "linear"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> LinearShape | None:
        *lead, c = spec.x.shape
        depth, k = spec.weight("w").shape
        if depth != c or spec.out.shape != (*lead, k) or not operands.fit(spec):
            return None
        return LinearShape(tuple(lead), c, k, spec.epilogue)

    def default_for(self, problem: LinearShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: LinearShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: LinearShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: LinearShape, arrays: Arrays) -> np.ndarray:
        return _reference(problem, arrays)
