"""Softmax of rows: a power of two of every number, over the sum of its row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu.builder import Buffer, Builder, Expr, lanes_of, splat
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.lanes import across, exp2, power_of_two
from schedules.cpu.primitives import operands, rows
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.rows import RowsShape, Tiling
from schedules.cpu.primitives.unrolling import even, every, sweep
from schedules.machines.cpus import Isa
from schedules.saa_shape import NO_SHARE
from schedules.spec import Epilogue, KernelSpec

UNROLLED = 8  # loops of up to this many turns are written out


def powers_of_rows(
    b: Builder,
    isa: Isa,
    scores: Buffer,
    pitch: int,
    vectors: int,
    inverse: Buffer,
    count: int,
    strict: bool = False,
) -> None:
    """`count` rows of so many vectors become powers of two, and `inverse` one over the sum of each row.

    What a row has beyond its last score must have no share. Scores are logarithms to base 2, and NO_SHARE is minus
    infinity enough. If `strict`, they are natural ones, of any size, and infinities and NaN come out as a softmax has
    to give them.
    """
    lanes = isa.lanes
    group = even(count, min(8, lanes))
    lowest = -math.inf if strict else NO_SHARE
    top = b.alloc("top", power_of_two(group))

    def raise_rows(first: Expr, size: int) -> None:
        """In place: no row may be done twice."""

        def reduced(term: Callable[[Expr, Expr], Expr], combine: Callable[[Expr, Expr], Expr], start: float) -> Expr:
            results = []
            for i in range(size):
                result = b.cell("result", lanes)
                b.store(result, 0, splat(start, lanes))

                def step(j: Expr, i: int = i, result: Buffer = result) -> None:
                    value = term(i, (first + i) * pitch + j * lanes)
                    b.store(result, 0, combine(b.load(result, 0, lanes), value))

                every(b, "j", UNROLLED, vectors, step)
                results.append(b.load(result, 0, lanes))
            return across(b, results, combine)

        def raised(i: Expr, place: Expr) -> Expr:
            below = b.load(scores, place, lanes) - splat(b.load(top, i), lanes)
            power = exp2(b, below * splat(math.log2(math.e), lanes) if strict else below, strict)
            b.store(scores, place, power)
            return power

        b.store(top, 0, reduced(lambda _, place: b.load(scores, place, lanes), tirx.max, lowest))
        total = reduced(raised, lambda a, c: a + c, 0.0)
        b.store(inverse, first, splat(1.0, lanes_of(total)) / total)

    with b.loop("group", count // group) as index:
        raise_rows(index * group, group)
    if count % group:
        raise_rows(count // group * group, count % group)


@dataclass(frozen=True)
class SoftmaxShape(RowsShape):
    epilogue: Epilogue = field(default=Epilogue())

    @property
    def flops(self) -> int:
        return 16 * self.rows * self.c


class _Kernel:
    def __init__(self, shape: SoftmaxShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        self.vectors = -(-shape.c // isa.lanes)
        self.pitch = (self.vectors | 1) * isa.lanes  # odd, or else rows would compete for places in the cache
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        return operands.constants(self.shape.epilogue, weights)

    def function(self) -> tirx.PrimFunc:
        b = self.b
        self.x = b.param("x", self.shape.whole)
        self.ending = Ending(b, self.shape.epilogue, self.shape.whole)
        self.ending.declare_weights()
        self.out = b.param("out", self.shape.whole)
        rows.in_bands(b, self.shape, self.tiling, self._rows)
        return b.function("softmax")

    def _rows(self, first: Expr, count: int) -> None:
        """`count` rows: copied to scratch memory, raised there, and divided by their sums."""
        b, isa, c, lanes = self.b, self.isa, self.shape.c, self.isa.lanes
        scores = b.alloc("scores", count * self.pitch)
        inverse = b.alloc("inverse", count + lanes)
        with b.loop("row", count) as row:
            place = b.compute_once("place", (first + row) * c)

            def keep(i: Expr, width: int) -> None:
                b.store(scores, row * self.pitch + i, b.load(self.x, place + i, width))

            b.store(scores, row * self.pitch + (self.vectors - 1) * lanes, splat(-math.inf, lanes))
            sweep(b, lanes, c, keep)
        powers_of_rows(b, isa, scores, self.pitch, self.vectors, inverse, count, strict=True)
        with b.loop("row", count) as row:
            place = b.compute_once("place", (first + row) * c)
            factor = b.bind("factor", b.load(inverse, row))

            def divided(i: Expr, width: int) -> None:
                share = b.load(scores, row * self.pitch + i, width) * splat(factor, width)
                b.store(self.out, place + i, self.ending.done(share, Spot(place + i, i)))

            sweep(b, lanes, c, divided)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis, in numpy."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class Softmax(Generator):
    """Over the last axis."""

    OP = "softmax"
    TILING = Tiling
    WIDE = True

    def problem(self, spec: KernelSpec) -> SoftmaxShape | None:
        *lead, c = spec.x.shape
        fits = spec.out.shape == spec.x.shape and operands.fit(spec) and operands.weighted(spec, {})
        return SoftmaxShape(tuple(lead), c, spec.epilogue) if fits else None

    def default_for(self, problem: SoftmaxShape, unit: Isa, threads: int) -> Tiling:
        return rows.default(problem, threads)

    def tilings_for(self, problem: SoftmaxShape, unit: Isa) -> list[Tiling]:
        return rows.tilings(problem)

    def loops(self, problem: SoftmaxShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: SoftmaxShape, arrays: Arrays) -> np.ndarray:
        shares = softmax(np.asarray(arrays["x"], np.float64))
        return activations.reference(problem.epilogue.steps, shares, dict(arrays))
