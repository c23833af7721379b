"""Pooling: the largest value or the mean of windows, and the mean of a whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu.builder import Buffer, Builder, Expr, integer, minimum, splat
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.lanes import largest
from schedules.cpu.microkernel import pieces
from schedules.cpu.primitives import operands, windows
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.windows import Step, Sweep, Tiling, Windows, lanes_for
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec

ATTRS = ("kernel", "strides", "padding", "dilation", "mode")


@dataclass(frozen=True)
class PoolShape(Windows):
    mode: str = "max"
    count_padding: bool = False  # whether the mean counts what is padded
    epilogue: Epilogue = field(default=Epilogue())
    gates: tuple[str, ...] = ()


class _Pool(Sweep):
    shape: PoolShape

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        return operands.constants(self.shape.epilogue, weights)

    def function(self) -> tirx.PrimFunc:
        b, shape = self.b, self.shape
        x = b.param("x", shape.image)
        self.ending = Ending(b, shape.epilogue, shape.result, shape.gates)
        self.ending.declare_weights()
        self.out = b.param("out", shape.result)
        self.loops(x)
        return b.function("pool")

    def start(self, vector: Expr) -> Expr:
        return self.b.splat(-math.inf if self.shape.mode == "max" else 0.0, self.lanes)

    def row(self, vector: Expr, ky: Expr) -> Step:
        if self.shape.mode == "max":
            return lambda kx, total, value: largest(total, value)
        return lambda kx, total, value: total + value

    def finish(self, spot: Spot, vector: Expr, total: Expr, rows: Expr, columns: int) -> None:
        b, shape = self.b, self.shape
        if shape.mode == "avg":
            count = math.prod(shape.kernel) if shape.count_padding else integer(rows) * columns
            share = 1 / count if isinstance(count, int) else b.splat(1.0, 1) / tirx.Cast("float32", count)
            total = b.bind("mean", total * b.splat(share, self.lanes))
        b.store(self.out, spot.place, self.ending.done(total, spot))


def _pooled(shape: PoolShape, arrays: Arrays) -> np.ndarray:
    x, of_largest = arrays["x"], shape.mode == "max"
    seen = [each for _, _, each in windows.taps(shape, x, -np.inf if of_largest else 0.0)]
    counted = windows.taps(shape, np.ones_like(x), 1.0 if shape.count_padding else 0.0)
    out = np.max(seen, 0) if of_largest else np.sum(seen, 0) / sum(each for _, _, each in counted)
    return activations.reference(shape.epilogue.steps, out, dict(arrays))


class Pool(Generator):
    OP = "pool"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> PoolShape | None:
        if spec.x.layout != "NHWC" or spec["mode"] not in ("max", "avg"):
            return None
        if not operands.fit(spec, gated=True) or not operands.weighted(spec, {}):
            return None
        n, h, w, c = spec.x.shape
        kernel, strides, padding, dilation, mode = (spec[name] for name in ATTRS)
        counted = mode == "avg" and spec.get("count_padding", False)
        shape = PoolShape(
            *(n, h, w, c, kernel, strides, padding, dilation),
            mode=mode,
            count_padding=counted,
            epilogue=spec.epilogue,
            gates=operands.gates(spec),
        )
        return shape if spec.out.shape == shape.result else None

    def default_for(self, problem: PoolShape, unit: Isa, threads: int) -> Tiling:
        return windows.default(problem, _unit(problem, unit), threads)

    def tilings_for(self, problem: PoolShape, unit: Isa) -> list[Tiling]:
        return windows.tilings(problem, _unit(problem, unit))

    def loops(self, problem: PoolShape, unit: Isa, tiling: Tiling, threads: int) -> _Pool:
        unit = _unit(problem, unit)
        return _Pool(Builder(unit.dtype, unit.stored), unit, problem, tiling)

    def reference_for(self, problem: PoolShape, arrays: Arrays) -> np.ndarray:
        return _pooled(problem, arrays)


def _unit(shape: PoolShape, unit: Isa) -> Isa:
    """The largest value is as exact in the type that is stored, a mean is not."""
    return unit if shape.mode == "max" else unit.wide()


@dataclass(frozen=True)
class MeanShape:
    n: int
    h: int
    w: int
    c: int
    epilogue: Epilogue = field(default=Epilogue())

    @property
    def result(self) -> tuple[int, ...]:
        return self.n, self.c

    @property
    def flops(self) -> int:
        return self.n * self.h * self.w * self.c


@dataclass(frozen=True)
class MeanTiling:
    """`groups` tasks an image, each with its share of the channels, `vectors` at a time."""

    groups: int
    vectors: int


class _Mean:
    def __init__(self, shape: MeanShape, isa: Isa, tiling: MeanTiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        self.lanes = lanes_for(shape.c, isa)
        self.width = min(tiling.vectors * self.lanes, shape.c // self.lanes * self.lanes)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        return operands.constants(self.shape.epilogue, weights)

    def function(self) -> tirx.PrimFunc:
        shape, b, groups = self.shape, self.b, self.tiling.groups
        x = b.param("x", (shape.n, shape.h, shape.w, shape.c))
        self.ending = Ending(b, shape.epilogue, shape.result)
        self.ending.declare_weights()
        out = b.param("out", shape.result)
        parts = -(-shape.c // self.width)
        with b.loop("task", shape.n * groups, "parallel") as task:
            image, group = b.compute_once("image", task // groups), b.compute_once("group", task % groups)
            begin = b.compute_once("begin", group * parts // groups)
            end = b.compute_once("end", (group + 1) * parts // groups)
            with b.loop("part", end - begin) as index:
                # The last part is moved up to end with the channels.
                first = minimum((begin + index) * self.width, shape.c - self.width)
                self._part(x, image, b.compute_once("channel", first), out)
        return b.function("mean")

    def _part(self, x: Buffer, image: Expr, channel: Expr, out: Buffer) -> None:
        shape, b, lanes = self.shape, self.b, self.lanes
        positions, vectors = shape.h * shape.w, range(self.width // self.lanes)
        at = b.compute_once("at", image * positions * shape.c + channel)
        sums = [b.cell(f"sum{k}", lanes) for k in vectors]
        for total in sums:
            b.store(total, 0, splat(0.0, lanes))
        with b.loop("position", positions) as position:
            for k, total in zip(vectors, sums, strict=True):
                value = b.load(x, at + position * shape.c + k * lanes, lanes)
                b.store(total, 0, b.load(total, 0, lanes) + value)
        for k, total in zip(vectors, sums, strict=True):
            mean = b.load(total, 0, lanes) * splat(1 / positions, lanes)
            spot = Spot(image * shape.c + channel + k * lanes, channel + k * lanes)
            b.store(out, spot.place, self.ending.done(mean, spot))


class Mean(Generator):
    """Of every channel over all positions of an image."""

    OP = "mean"
    TILING = MeanTiling
    WIDE = True

    def problem(self, spec: KernelSpec) -> MeanShape | None:
        if spec.x.layout != "NHWC" or not operands.fit(spec) or not operands.weighted(spec, {}):
            return None
        n, h, w, c = spec.x.shape
        shape = MeanShape(n, h, w, c, spec.epilogue)
        return shape if spec.out.shape == shape.result else None

    def default_for(self, problem: MeanShape, unit: Isa, threads: int) -> MeanTiling:
        lanes = lanes_for(problem.c, unit)
        needed = threads // math.gcd(threads, problem.n)
        vectors = max(1, min(8, problem.c // lanes // needed))
        return MeanTiling(min(needed, -(-problem.c // (vectors * lanes))), vectors)

    def tilings_for(self, problem: MeanShape, unit: Isa) -> list[MeanTiling]:
        starts = [self.default_for(problem, unit, threads) for threads in (1, 2, 4, 8)]
        found = [replace(start, vectors=max(1, start.vectors >> less)) for start in starts for less in (0, 1, 2)]
        return list(dict.fromkeys(found))

    def loops(self, problem: MeanShape, unit: Isa, tiling: MeanTiling, threads: int) -> _Mean:
        return _Mean(problem, unit, tiling)

    def reference_for(self, problem: MeanShape, arrays: Arrays) -> np.ndarray:
        mean = np.asarray(arrays["x"], np.float64).mean((1, 2))
        return activations.reference(problem.epilogue.steps, mean, dict(arrays))


def sum_positions(b: Builder, isa: Isa, x: Buffer, image: Expr, positions: int, channels: int, target: Buffer) -> None:
    """Sums of every channel over the positions of one image, for blocks that go on with them."""

    def add_up(at: Expr, to: Expr, lanes: int) -> None:
        total = b.cell("total", lanes)
        b.store(total, 0, splat(0.0, lanes))
        with b.loop("position", positions) as position:
            b.store(total, 0, b.load(total, 0, lanes) + b.load(x, at + position * channels, lanes))
        b.store(target, to, b.load(total, 0, lanes))

    if channels < isa.lanes:
        for start, width in pieces(channels, isa.lanes):
            add_up(image * positions * channels + start, image * channels + start, width)
        return
    with b.loop("vector", channels // isa.lanes) as vector:
        at = b.compute_once("at", image * positions * channels + vector * isa.lanes)
        add_up(at, image * channels + vector * isa.lanes, isa.lanes)
    done = channels // isa.lanes * isa.lanes
    for start, width in pieces(channels - done, isa.lanes):
        at = b.compute_once("at", image * positions * channels + done + start)
        add_up(at, image * channels + done + start, width)
