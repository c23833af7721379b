"""Group norm: images less the mean of each group of channels, over its deviation.

Three sweeps over an image, each of which all tasks share: sums by channel, squares of what lies beside the mean, and
the result. Between them sums of channels become means of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu.builder import Buffer, Builder, Expr, minimum, splat
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.primitives import operands
from schedules.cpu.primitives.norm import BIAS, of_epilogue
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.windows import lanes_for
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec

AT_A_TIME = 8  # vectors of sums, in registers


@dataclass(frozen=True)
class GroupNormShape:
    n: int
    h: int
    w: int
    c: int
    groups: int
    eps: float = 1e-5
    epilogue: Epilogue = field(default=Epilogue())

    @property
    def whole(self) -> tuple[int, ...]:
        return self.n, self.h, self.w, self.c

    @property
    def positions(self) -> int:
        return self.h * self.w

    @property
    def flops(self) -> int:
        return 6 * math.prod(self.whole)


@dataclass(frozen=True)
class Tiling:
    """`bands` tasks an image."""

    bands: int


class _Kernel:
    def __init__(self, shape: GroupNormShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.bands = shape, min(tiling.bands, shape.positions)
        self.vector = lanes_for(shape.c, isa)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        own = [np.asarray(weights[name], np.float32) for name in "gb"]
        return [*own, *operands.constants(self.shape.epilogue, of_epilogue(weights))]

    def function(self) -> tirx.PrimFunc:
        shape, b = self.shape, self.b
        self.x = b.param("x", shape.whole)
        ending = Ending(b, shape.epilogue, shape.whole)
        gain, offset = (b.param(name, (shape.c,), "float32") for name in ("gain", "offset"))
        ending.declare_weights()
        out = b.param("out", shape.whole)
        self.sums = b.alloc("sums", shape.n * self.bands * shape.c)
        mean, factor, shift = (b.alloc(name, shape.n * shape.c) for name in ("mean", "factor", "shift"))

        def beside(value: Expr, column: Expr) -> Expr:
            away = b.bind("away", value - b.load(mean, column, self.vector))
            return away * away

        def scaled(column: Expr, channel: Expr, variance: Expr) -> None:
            scale = b.bind("scale", b.load(gain, channel) / tirx.sqrt(variance + tirx.const(shape.eps, "float32")))
            b.store(factor, column, scale)
            b.store(shift, column, b.load(offset, channel) - scale * b.load(mean, column))

        self._summed(lambda value, _column: value)
        self._by_group(lambda column, _channel, value: b.store(mean, column, value))
        self._summed(beside)
        self._by_group(scaled)

        def finish(place: Expr, column: Expr, channel: Expr) -> None:
            value = b.load(self.x, place, self.vector) * b.load(factor, column, self.vector)
            spot = Spot(place, channel)
            b.store(out, place, ending.done(value + b.load(shift, column, self.vector), spot))

        with self._tasks() as (image, _, first, last), b.loop("position", last - first) as position:
            start = b.compute_once("start", (image * shape.positions + first + position) * shape.c)
            with b.loop("k", self._vectors) as k:
                channel = self._channel(k)
                finish(start + channel, image * shape.c + channel, channel)
        return b.function("group_norm")

    @property
    def _vectors(self) -> int:
        return -(-self.shape.c // self.vector)

    def _channel(self, k: Expr) -> Expr:
        """Where a vector begins: the last one is moved back to end with the channels."""
        return self.b.compute_once("channel", minimum(k * self.vector, self.shape.c - self.vector))

    @contextmanager
    def _tasks(self) -> Iterator[tuple[Expr, Expr, Expr, Expr]]:
        """An image, the number of the task, and its first and last positions."""
        b, bands, positions = self.b, self.bands, self.shape.positions
        with b.loop("task", self.shape.n * bands, "parallel") as task:
            image, band = b.compute_once("image", task // bands), b.compute_once("band", task % bands)
            first = b.compute_once("first", band * positions // bands)
            yield image, task, first, b.compute_once("last", (band + 1) * positions // bands)

    def _summed(self, term: Callable[[Expr, Expr], Expr]) -> None:
        """The sum by channel of a term, over the positions of every task."""
        shape, b, vector = self.shape, self.b, self.vector
        with self._tasks() as (image, task, first, last):
            start = b.compute_once("start", (image * shape.positions + first) * shape.c)
            for k in range(0, self._vectors, AT_A_TIME):
                channels = [self._channel(each) for each in range(k, min(k + AT_A_TIME, self._vectors))]
                totals = [b.cell(f"total{i}", vector) for i in range(len(channels))]
                for total in totals:
                    b.store(total, 0, splat(0.0, vector))
                with b.loop("position", last - first) as position:
                    for total, channel in zip(totals, channels, strict=True):
                        value = b.load(self.x, start + position * shape.c + channel, vector)
                        more = term(value, image * shape.c + channel)
                        b.store(total, 0, b.load(total, 0, vector) + more)
                for total, channel in zip(totals, channels, strict=True):
                    b.store(self.sums, task * shape.c + channel, b.load(total, 0, vector))

    def _by_group(self, store: Callable[[Expr, Expr, Expr], None]) -> None:
        """store(column, channel, mean) for every channel of every image: the mean is of its group."""
        shape, b = self.shape, self.b
        width = shape.c // shape.groups
        with b.loop("image", shape.n) as image, b.loop("group", shape.groups) as group:
            total: Buffer = b.cell("group_total", 1)
            b.store(total, 0, tirx.const(0.0, "float32"))
            with b.loop("band", self.bands) as band, b.loop("i", width) as i:
                place = (image * self.bands + band) * shape.c + group * width + i
                b.store(total, 0, b.load(total, 0) + b.load(self.sums, place))
            mean = b.bind("mean", b.load(total, 0) * tirx.const(1 / (shape.positions * width), "float32"))
            with b.loop("i", width) as i:
                store(image * shape.c + group * width + i, group * width + i, mean)


class GroupNorm(Generator):
    """Over the positions and the channels of a group, with a gain and an offset by channel."""

    OP = "group_norm"
    TILING = Tiling
    WIDE = True

    def problem(self, spec: KernelSpec) -> GroupNormShape | None:
        if spec.x.layout != "NHWC" or spec.out.shape != spec.x.shape or not operands.fit(spec):
            return None
        n, h, w, c = spec.x.shape
        added = {BIAS if name == "b" else name: (c,) for name in spec.epilogue.weights}
        if {each.name: each.shape for each in spec.weights} != {"g": (c,), "b": (c,), **added}:
            return None
        return GroupNormShape(n, h, w, c, spec["groups"], spec["eps"], spec.epilogue)

    def default_for(self, problem: GroupNormShape, unit: Isa, threads: int) -> Tiling:
        return Tiling(min(problem.positions, threads // math.gcd(threads, problem.n)))

    def tilings_for(self, problem: GroupNormShape, unit: Isa) -> list[Tiling]:
        return list(dict.fromkeys(self.default_for(problem, unit, threads) for threads in (1, 2, 4, 8)))

    def loops(self, problem: GroupNormShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: GroupNormShape, arrays: Arrays) -> np.ndarray:
        x = np.asarray(arrays["x"], np.float64).reshape(problem.n, problem.positions, problem.groups, -1)
        away = x - x.mean((1, 3), keepdims=True)
        normal = (away / np.sqrt((away**2).mean((1, 3), keepdims=True) + problem.eps)).reshape(problem.whole)
        scaled = normal * arrays["g"] + arrays["b"]
        return activations.reference(problem.epilogue.steps, scaled, of_epilogue(arrays))
