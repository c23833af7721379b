"""Layer norm: rows less their mean, over their deviation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu.builder import Buffer, Builder, Expr, lanes_of, minimum, splat
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.lanes import across, power_of_two, without_first
from schedules.cpu.primitives import operands, rows
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.rows import RowsShape, Tiling
from schedules.cpu.primitives.unrolling import even, every
from schedules.cpu.primitives.windows import lanes_for
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec

BIAS = "bias"  # the epilogue's weight, as `b` is the norm's own
WRITTEN_OUT = 16  # vectors of a row that are no loop: of more, LLVM takes seconds


@dataclass(frozen=True)
class LayerNormShape(RowsShape):
    eps: float = 1e-5
    epilogue: Epilogue = field(default=Epilogue())

    @property
    def flops(self) -> int:
        return 8 * self.rows * self.c


def normalised_rows(
    b: Builder,
    source: Buffer,
    start: Callable[[Expr], Expr],
    count: int,
    width: int,
    vector: int,
    eps: float,
    finish: Callable[[Expr, Expr, Expr], None],
    written_out: int = WRITTEN_OUT,
) -> None:
    """(x - mean) / deviation of `count` rows that are `width` neighbours each, from source[start(row)] on.

    `finish(row, column, values)` gets vectors of a row, the last of which is moved back where they do not fill it.
    Three sweeps, none of which waits for what it has just computed.
    """
    vectors, twice = -(-width // vector), -width % vector
    strip = even(count, vector if vector < 8 else 8)
    mean = b.alloc("mean", count + vector)
    scale = b.alloc("scale", count + vector)

    def column(k: Expr) -> Expr:
        return minimum(k * vector, width - vector) if twice else k * vector

    def value(row: Expr, k: Expr) -> Expr:
        return b.load(source, start(row) + column(k), vector)

    def once(k: Expr, term: Expr) -> Expr:
        return without_first(b, term, twice) if twice and isinstance(k, int) and k == vectors - 1 else term

    def plain(row: Expr, k: Expr) -> Expr:
        return once(k, value(row, k))

    def square(row: Expr, k: Expr) -> Expr:
        away = b.bind("away", value(row, k) - splat(b.load(mean, row), vector))
        return once(k, away * away)

    def deviation(total: Expr) -> Expr:
        lanes = lanes_of(total)
        return splat(1.0, lanes) / tirx.sqrt(total + splat(eps, lanes))

    for statistic, term, of_mean in ((mean, plain, lambda total: total), (scale, square, deviation)):
        with b.loop("strip", -(-count // strip)) as index:
            first = b.bind("start", minimum(index * strip, count - strip))
            sums = [_sum(b, vectors, written_out, partial(term, first + i)) for i in range(strip)]
            total = across(b, sums, lambda a, c: a + c)
            b.store(statistic, first, of_mean(total * splat(1 / width, lanes_of(total))))
    with b.loop("place", count) as row:
        factor = b.bind("factor", b.load(scale, row))
        shift = b.bind("shift", splat(factor * b.load(mean, row), vector))

        def normal(k: Expr, row: Expr = row, factor: Expr = factor, shift: Expr = shift) -> None:
            finish(row, column(k), value(row, k) * splat(factor, vector) - shift)

        every(b, "k", written_out, vectors, normal)


def _sum(b: Builder, vectors: int, written_out: int, term: Callable[[Expr], Expr]) -> Expr:
    """Terms of all vectors, in a few independent chains."""
    chains = min(4, power_of_two(vectors + 1) // 2)
    sums = [b.bind("partial", term(k)) for k in range(chains)]
    done = chains
    if vectors > written_out:  # in a loop, but for the last vector, which may not be like the others
        turns = (vectors - 1) // chains - 1
        done += turns * chains
        sums = _in_loop(b, sums, turns, lambda turn, i: term((turn + 1) * chains + i))
    for k in range(done, vectors):
        sums[k % chains] = b.bind("partial", sums[k % chains] + term(k))
    while len(sums) > 1:
        sums = [a + c for a, c in zip(sums[::2], sums[1::2], strict=True)]
    return b.bind("sum", sums[0])


def _in_loop(b: Builder, sums: list[Expr], turns: int, term: Callable[[Expr, int], Expr]) -> list[Expr]:
    """A term more for every chain, turn by turn."""
    lanes = lanes_of(sums[0])
    cells = [b.cell("chain", lanes) for _ in sums]
    for cell, value in zip(cells, sums, strict=True):
        b.store(cell, 0, value)
    with b.loop("turn", turns) as turn:
        for i, cell in enumerate(cells):
            b.store(cell, 0, b.load(cell, 0, lanes) + term(turn, i))
    return [b.bind("partial", b.load(cell, 0, lanes)) for cell in cells]


class _Kernel:
    def __init__(self, shape: LayerNormShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.tiling = shape, tiling
        self.vector = lanes_for(shape.c, isa)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        own = [np.asarray(weights[name], np.float32) for name in "gb"]
        return [*own, *operands.constants(self.shape.epilogue, of_epilogue(weights))]

    def function(self) -> tirx.PrimFunc:
        b, c = self.b, self.shape.c
        x = b.param("x", self.shape.whole)
        ending = Ending(b, self.shape.epilogue, self.shape.whole)
        gain, bias = (b.param(name, (c,), "float32") for name in ("gain", "bias"))
        ending.declare_weights()
        out = b.param("out", self.shape.whole)

        def body(first: Expr, count: int) -> None:
            def finish(row: Expr, column: Expr, value: Expr) -> None:
                scaled = value * b.load(gain, column, self.vector) + b.load(bias, column, self.vector)
                spot = Spot((first + row) * c + column, column)
                b.store(out, spot.place, ending.done(scaled, spot))

            normalised_rows(b, x, lambda row: (first + row) * c, count, c, self.vector, self.shape.eps, finish)

        rows.in_bands(b, self.shape, self.tiling, body)
        return b.function("layer_norm")


def of_epilogue(arrays: Arrays) -> dict[str, np.ndarray]:
    """The arrays by the names that they have in an epilogue."""
    return {**arrays, "b": arrays[BIAS]} if BIAS in arrays else dict(arrays)


class LayerNorm(Generator):
    """Over the last axis, with a gain and a bias by channel."""

    OP = "layer_norm"
    TILING = Tiling
    WIDE = True

    def problem(self, spec: KernelSpec) -> LayerNormShape | None:
        *lead, c = spec.x.shape
        if spec.out.shape != spec.x.shape or not operands.fit(spec):
            return None
        added = {BIAS if name == "b" else name: (c,) for name in spec.epilogue.weights}
        if {each.name: each.shape for each in spec.weights} != {"g": (c,), "b": (c,), **added}:
            return None
        return LayerNormShape(tuple(lead), c, spec["eps"], spec.epilogue)

    def default_for(self, problem: LayerNormShape, unit: Isa, threads: int) -> Tiling:
        return rows.default(problem, threads)

    def tilings_for(self, problem: LayerNormShape, unit: Isa) -> list[Tiling]:
        return rows.tilings(problem)

    def loops(self, problem: LayerNormShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: LayerNormShape, arrays: Arrays) -> np.ndarray:
        x = np.asarray(arrays["x"], np.float64)
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + problem.eps)
        normal = centred / deviation * arrays["g"] + arrays["b"]
        return activations.reference(problem.epilogue.steps, normal, of_epilogue(arrays))
