"""The head: the mean over all positions, then a linear layer.

The layer reads every weight once, so a task takes some panels of it; each computes the mean for itself, which is
small beside its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules.cpu import microkernel
from schedules.cpu.builder import Builder, Expr, lanes_of
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives.pool import sum_positions
from schedules.machines.cpus import Isa
from schedules.spec import KernelSpec


@dataclass(frozen=True)
class HeadShape:
    n: int
    h: int
    w: int
    c: int
    k: int

    @property
    def flops(self) -> int:
        return self.n * self.c * (self.h * self.w + 2 * self.k)


@dataclass(frozen=True)
class Tiling:
    """`groups` tasks, each with its share of the columns, and the register tile."""

    groups: int
    rows: int
    vectors: int
    unroll: int


def _default(shape: HeadShape, isa: Isa, threads: int = 1) -> Tiling:
    rows = min(shape.n, 4)
    vectors = max(1, min((isa.registers - 2 * rows) // (rows + 1), 8, -(-shape.k // isa.lanes)))
    panels = microkernel.panels(shape.k, Tile(rows, vectors), isa)
    return Tiling(min(threads, panels), rows, vectors, 2)


def _tilings(shape: HeadShape, isa: Isa) -> list[Tiling]:
    starts = [_default(shape, isa, threads) for threads in (1, 2, 4, 8)]
    found = [
        replace(start, vectors=max(1, start.vectors - less), unroll=unroll)
        for start, less, unroll in product(starts, (0, 1, 4), (1, 2, 4))
    ]
    return list(dict.fromkeys(found))


class _Kernel:
    def __init__(self, shape: HeadShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.groups = shape, isa, tiling.groups
        self.tile = Tile(tiling.rows, tiling.vectors, tiling.unroll)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        summed = weights["w"] / np.float32(self.shape.h * self.shape.w)
        return [microkernel.pack(summed, self.tile, self.isa), np.asarray(weights["b"], np.float32)]

    def function(self) -> tirx.PrimFunc:
        shape, isa, tile, groups = self.shape, self.isa, self.tile, self.groups
        b = Builder(isa.dtype, isa.stored)
        panels = microkernel.panels(shape.k, tile, isa)
        x = b.param("x", (shape.n, shape.h, shape.w, shape.c))
        weight = b.param("weight", (panels, shape.c, tile.vectors * isa.lanes))
        bias = b.param("bias", (shape.k,))
        out = b.param("out", (shape.n, shape.k))

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            b.store(out, row * shape.k + column, value + b.load(bias, column, lanes_of(value)))

        with b.loop("task", groups, "parallel") as task:
            begin = b.compute_once("begin", task * panels // groups)
            end = b.compute_once("end", (task + 1) * panels // groups)
            # The number of positions is divided out of the weights.
            mean = b.alloc("mean", shape.n * shape.c)
            with b.loop("image", shape.n) as image:
                sum_positions(b, isa, x, image, shape.h * shape.w, shape.c, mean)
            a = Rows(mean, lambda row: row * shape.c, ((shape.c, 1),))
            some = None if groups == 1 else (begin, end - begin)
            microkernel.gemm(b, isa, tile, a, weight, shape.n, shape.k, finish, some)
        return b.function("head")


def _reference(x: np.ndarray, weights: Arrays, shape: HeadShape) -> np.ndarray:
    return x.astype(np.float64).mean((1, 2)) @ weights["w"] + weights["b"]


class Head(Generator):
    OP = "head"
    TILING = Tiling
    WIDE = True

    def problem(self, spec: KernelSpec) -> HeadShape | None:
        n, h, w, c = spec.x.axes("NHWC")
        return HeadShape(n, h, w, c, k=spec.weight("b").shape[0])

    def default_for(self, problem: HeadShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: HeadShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: HeadShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: HeadShape, arrays: Arrays) -> np.ndarray:
        return _reference(arrays["x"], arrays, problem)
