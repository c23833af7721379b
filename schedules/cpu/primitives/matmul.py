"""A product of two tensors of which neither is a weight, for every item of a batch, with its epilogue.

Whoever multiplies rows by a panel of the right factor first copies that panel as the register tile reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.microkernel import Rows, Tile, pieces
from schedules.cpu.primitives import operands
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec


@dataclass(frozen=True)
class MatmulShape:
    """`m` rows times `k` columns over a depth of `c`, for all of `lead`."""

    lead: tuple[int, ...]
    m: int
    c: int
    k: int
    epilogue: Epilogue = field(default=Epilogue())

    @property
    def batch(self) -> int:
        return math.prod(self.lead)

    @property
    def result(self) -> tuple[int, ...]:
        return *self.lead, self.m, self.k

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.c * self.k


@dataclass(frozen=True)
class Tiling:
    """Items of the batch in `bands` of rows each, and the register tile."""

    bands: int
    rows: int
    vectors: int
    unroll: int


def _default(shape: MatmulShape, isa: Isa, threads: int = 1) -> Tiling:
    bands = min(shape.m, threads // math.gcd(threads, shape.batch))
    tile = microkernel.tile_for(isa, shape.m // bands, shape.k)
    return Tiling(bands, tile.rows, tile.vectors, 4)


def _tilings(shape: MatmulShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = _default(shape, isa, threads)
        for tile, unroll in product(microkernel.tiles(isa, shape.m // start.bands, shape.k)[:5], (4, 8)):
            found[replace(start, rows=tile.rows, vectors=tile.vectors, unroll=unroll)] = None
    return list(found)


class _Kernel:
    def __init__(self, shape: MatmulShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        self.tile = Tile(min(tiling.rows, shape.m // tiling.bands), tiling.vectors, tiling.unroll)
        self.width = self.tile.vectors * isa.lanes
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        return operands.constants(self.shape.epilogue, weights)

    def function(self) -> tirx.PrimFunc:
        shape, b, bands = self.shape, self.b, self.tiling.bands
        self.x = b.param("x", (*shape.lead, shape.m, shape.c))
        self.y = b.param("y", (*shape.lead, shape.c, shape.k))
        self.ending = Ending(b, shape.epilogue, shape.result)
        self.ending.declare_weights()
        self.out = b.param("out", shape.result)
        with b.loop("task", shape.batch * bands, "parallel") as task:
            item = b.compute_once("item", task // bands)
            first = b.compute_once("first", task % bands * shape.m // bands)
            last = b.compute_once("last", (task % bands + 1) * shape.m // bands)
            packed = b.alloc("packed", shape.c * self.width)
            whole, rest = divmod(shape.k, self.width)
            if whole:
                with b.loop("panel", whole) as panel:
                    column = b.compute_once("column", panel * self.width)
                    self._multiplied(item, first, last - first, column, self.width, packed)
            if rest:
                self._multiplied(item, first, last - first, whole * self.width, rest, packed)
        return b.function("matmul")

    def _multiplied(self, item: Expr, first: Expr, rows: Expr, column: Expr, columns: int, packed: Buffer) -> None:
        """Rows of the left factor times `columns` of the right one."""
        shape, b = self.shape, self.b
        self._packed(item, column, columns, packed)
        start = b.compute_once("start", item * shape.m + first)

        def finish(row: Expr, within: Expr, value: Expr) -> None:
            channel = column + within
            place = b.compute_once("place", (start + row) * shape.k + channel)
            b.store(self.out, place, self.ending.done(value, Spot(place, channel)))

        a = Rows(self.x, lambda row: (start + row) * shape.c, ((shape.c, 1),))
        microkernel.gemm(b, self.isa, self.tile, a, packed, rows, columns, finish)

    def _packed(self, item: Expr, column: Expr, columns: int, packed: Buffer) -> None:
        """Some columns of the right factor as one panel, with zeros in the vectors that they do not fill."""
        shape, b, lanes = self.shape, self.b, self.isa.lanes
        with b.loop("k", shape.c) as k:
            source = b.compute_once("source", (item * shape.c + k) * shape.k + column)
            for start in range(0, columns, lanes):
                wanted = min(lanes, columns - start)
                if wanted < lanes:
                    b.store(packed, k * self.width + start, b.splat(0.0, lanes))
                for within, count in pieces(wanted, lanes):
                    place = start + within
                    b.store(packed, k * self.width + place, b.load(self.y, source + place, count))


def _reference(shape: MatmulShape, arrays: Arrays) -> np.ndarray:
    out = np.asarray(arrays["x"], np.float64) @ arrays["y"]
    return activations.reference(shape.epilogue.steps, out, dict(arrays))


class Matmul(Generator):
    OP = "matmul"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> MatmulShape | None:
        x, y = (each.shape for each in spec.inputs[:2])
        if x[:-2] != y[:-2] or x[-1] != y[-2] or spec.out.shape != (*x[:-1], y[-1]):
            return None
        if not operands.fit(spec, own=2) or not operands.weighted(spec, {}):
            return None
        return MatmulShape(x[:-2], x[-2], x[-1], y[-1], spec.epilogue)

    def default_for(self, problem: MatmulShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: MatmulShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: MatmulShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: MatmulShape, arrays: Arrays) -> np.ndarray:
        return _reference(problem, arrays)
