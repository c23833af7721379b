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
from schedules.cpu.builder import Buffer, Builder, Expr, lanes_of, splat
from schedules.cpu.isa import Isa
from schedules.cpu.lowered import any_shape, generator
from schedules.cpu.microkernel import Rows, Tile, pieces


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


def default_tiling(shape: HeadShape, isa: Isa, threads: int = 1) -> Tiling:
    rows = min(shape.n, 4)
    vectors = max(1, min((isa.registers - 2 * rows) // (rows + 1), 8, -(-shape.k // isa.lanes)))
    panels = microkernel.panels(shape.k, Tile(rows, vectors), isa)
    return Tiling(min(threads, panels), rows, vectors, 2)


def tilings(shape: HeadShape, isa: Isa) -> list[Tiling]:
    starts = [default_tiling(shape, isa, threads) for threads in (1, 2, 4, 8)]
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
        b = Builder(isa.dtype, isa.stored, isa.cells)
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
            mean = b.alloc("mean", shape.n * shape.c)
            with b.loop("image", shape.n) as image:
                _mean(b, isa, shape, x, image, mean)
            a = Rows(mean, lambda row: row * shape.c, ((shape.c, 1),))
            some = None if groups == 1 else (begin, end - begin)
            microkernel.gemm(b, isa, tile, a, weight, shape.n, shape.k, finish, some)
        return b.function("head")


accepts = any_shape
lower = generator(_Kernel, default_tiling)


def _mean(b: Builder, isa: Isa, shape: HeadShape, x: Buffer, image: Expr, mean: Buffer) -> None:
    """Sums over the positions of one image; their number is divided out of the weights."""
    positions = shape.h * shape.w
    for start, width in pieces(shape.c, isa.lanes) if shape.c < isa.lanes else []:
        _sum(b, x, image * positions * shape.c + start, positions, shape.c, mean, image * shape.c + start, width)
    if shape.c < isa.lanes:
        return
    with b.loop("vector", shape.c // isa.lanes) as vector:
        at = b.compute_once("at", image * positions * shape.c + vector * isa.lanes)
        _sum(b, x, at, positions, shape.c, mean, image * shape.c + vector * isa.lanes, isa.lanes)
    done = shape.c // isa.lanes * isa.lanes
    for start, width in pieces(shape.c - done, isa.lanes):
        at = b.compute_once("at", image * positions * shape.c + done + start)
        _sum(b, x, at, positions, shape.c, mean, image * shape.c + done + start, width)


def _sum(b: Builder, x: Buffer, at: Expr, count: int, pitch: int, target: Buffer, to: Expr, lanes: int) -> None:
    total = b.cell("total", lanes)
    b.store(total, 0, splat(0.0, lanes))
    with b.loop("position", count) as position:
        b.store(total, 0, b.load(total, 0, lanes) + b.load(x, at + position * pitch, lanes))
    b.store(target, to, b.load(total, 0, lanes))


def reference(x: np.ndarray, weights: dict[str, np.ndarray], shape: HeadShape) -> np.ndarray:
    return x.astype(np.float64).mean((1, 2)) @ weights["w"] + weights["b"]
