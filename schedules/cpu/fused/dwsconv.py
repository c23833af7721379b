"""DWSConv as one kernel: x + pointwise(gelu(depthwise(x))).

Each task takes a band of rows in chunks: a block of channels of the chunk is copied, convolved while hot, and kept as
the left operand of the pointwise product, whose epilogue adds bias and residual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, fill, integer, maximum, minimum
from schedules.cpu.epilogue import applied
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.math import gelus
from schedules.cpu.microkernel import Rows, Tile, pieces
from schedules.cpu.primitives import depthwise, operands
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec

RESIDUAL = Epilogue(("bias", "add x"))
ROWS = depthwise.TAPS + 1


@dataclass(frozen=True)
class DWSConvShape:
    n: int
    h: int
    w: int
    c: int

    @property
    def flops(self) -> int:
        return 2 * self.n * self.h * self.w * self.c * (self.c + 9)


@dataclass(frozen=True)
class Tiling:
    """`bands` tasks a picture, `chunk` rows at a time, `block` vectors of channels, and the register tile."""

    bands: int
    chunk: int
    strip: int
    block: int
    rows: int
    vectors: int
    unroll: int


def _default(shape: DWSConvShape, isa: Isa, threads: int = 1) -> Tiling:
    bands = min(shape.h, threads // math.gcd(threads, shape.n))
    chunk = max(1, min(-(-shape.h // bands), 2048 // shape.w))
    tile = microkernel.tile_for(isa, shape.w * chunk, shape.c)
    return Tiling(bands, chunk, min(shape.w, 7), 2, tile.rows, tile.vectors, 4)


def _tilings(shape: DWSConvShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = _default(shape, isa, threads)
        chunks = {start.chunk, -(-start.chunk // 2), -(-start.chunk // 4)}
        best = microkernel.tiles(isa, shape.h * shape.w, shape.c)[:4]
        for chunk, tile, strip, block in product(sorted(chunks), best, (4, 7), (1, 2)):
            chosen = replace(start, chunk=chunk, strip=min(shape.w, strip), block=block)
            found[replace(chosen, rows=tile.rows, vectors=tile.vectors)] = None
    return list(found)


class _Kernel:
    def __init__(self, shape: DWSConvShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        # A register tile cannot be higher than the fewest rows that a product may meet.
        rows = shape.w * (shape.h if tiling.bands == 1 and tiling.chunk >= shape.h else 1)
        self.tile = Tile(min(rows, tiling.rows), tiling.vectors, tiling.unroll)
        self.block = tiling.block * isa.lanes
        self.blocks = -(-shape.c // self.block)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        point = np.zeros((self.blocks * self.block, self.shape.c), np.float32)
        point[: self.shape.c] = weights["pw_w"]
        return [
            depthwise.pack([*weights["dw_w"].reshape(9, self.shape.c), weights["dw_b"]], self.block),
            microkernel.pack(point, self.tile, self.isa),
            np.asarray(weights["pw_b"], np.float32),
        ]

    def function(self) -> tirx.PrimFunc:
        shape, b, bands = self.shape, self.b, self.tiling.bands
        image_shape = (shape.n, shape.h, shape.w, shape.c)
        panels = microkernel.panels(shape.c, self.tile, self.isa)
        self.x = b.param("x", image_shape)
        self.depth_w = b.param("depth_w", (self.blocks, ROWS, self.block))
        self.point_w = b.param("point_w", (panels, self.blocks * self.block, self.tile.vectors * self.isa.lanes))
        self.point_b = b.param("point_b", (shape.c,))
        self.out = b.param("out", image_shape)
        with b.loop("task", shape.n * bands, "parallel") as task:
            image = b.compute_once("image", task // bands)
            first = b.compute_once("first", task % bands * shape.h // bands)
            last = b.compute_once("last", (task % bands + 1) * shape.h // bands)
            self._band(image, first, last)
        return b.function("dwsconv")

    def _band(self, image: Expr, first: Expr, last: Expr) -> None:
        """Rows first .. last of one image, `chunk` at a time."""
        shape, b, chunk = self.shape, self.b, self.tiling.chunk
        patch = b.alloc("patch", (chunk + 2) * shape.w * self.block)
        z = b.alloc("z", self.blocks * chunk * shape.w * self.block)
        with b.loop("chunk", (last - first + chunk - 1) // chunk) as index:
            low = b.compute_once("low", first + index * chunk)
            high = b.compute_once("high", minimum(low + chunk, last))
            with b.loop("block", self.blocks) as block:
                self._gathered(block, image, low, high, patch)
                with b.loop("y", high - low) as y:
                    self._convolved(block, patch, y, z)
            self._multiplied(z, b.compute_once("position", (image * shape.h + low) * shape.w), (high - low) * shape.w)

    def _gathered(self, block: Expr, image: Expr, low: Expr, high: Expr, patch: Buffer) -> None:
        """Rows low - 1 .. high + 1 of a channel block; zeros beyond the image and beyond the last channel."""
        shape, b, lanes = self.shape, self.b, self.isa.lanes
        line = shape.w * self.block
        top = b.compute_once("top", maximum(low - 1, 0))
        bottom = b.compute_once("bottom", minimum(high + 1, shape.h))
        with b.when(integer(low) == 0):
            fill(b, lanes, patch, 0, line)
        with b.when(integer(high) == shape.h):
            fill(b, lanes, patch, (high - low + 1) * line, line)
        source = b.compute_once("source", (image * shape.h + top) * shape.w * shape.c + block * self.block)
        target = b.compute_once("target", (top - low + 1) * line)
        full = shape.c // self.block

        def rows(wanted: int) -> None:
            with b.loop("at", (bottom - top) * shape.w) as at:
                for start, width in pieces(wanted, lanes):
                    b.store(
                        patch, target + at * self.block + start, b.load(self.x, source + at * shape.c + start, width)
                    )

        if full == self.blocks:
            rows(self.block)
            return
        with b.when(integer(block) < full):
            rows(self.block)
        with b.when(integer(block) == full):
            fill(b, lanes, patch, 0, (self.tiling.chunk + 2) * line)
            rows(shape.c - full * self.block)

    def _convolved(self, block: Expr, patch: Buffer, y: Expr, z: Buffer) -> None:
        shape, b = self.shape, self.b
        taps = b.compute_once("taps", block * ROWS * self.block)
        place = b.compute_once("place", (block * self.tiling.chunk + y) * shape.w)

        def finish(x: Expr, channel: Expr, values: list[Expr]) -> None:
            for i, result in enumerate(gelus(b, values)):
                b.store(z, (place + x + i) * self.block + channel, result)

        top = b.compute_once("above", y * shape.w * self.block)
        depthwise.depthwise_row(
            b, self.isa, patch, top, shape.w, self.block, self.depth_w, taps, self.tiling.strip, finish
        )

    def _multiplied(self, z: Buffer, position: Expr, rows: Expr) -> None:
        """out = x + z @ pointwise + bias."""
        shape, b = self.shape, self.b
        pitch = self.tiling.chunk * shape.w * self.block
        a = Rows(z, lambda row: row * self.block, ((self.blocks, pitch), (self.block, 1)))

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            place = b.compute_once("place", (position + row) * shape.c + column)
            operand = operands.at(b, {"x": self.x}, place, self.point_b, column)
            b.store(self.out, place, applied(b, RESIDUAL, value, operand))

        microkernel.gemm(b, self.isa, self.tile, a, self.point_w, b.compute_once("rows", rows), shape.c, finish)


def _reference(x: np.ndarray, weights: Arrays, shape: DWSConvShape) -> np.ndarray:
    from schedules.cpu.reference import depthwise3x3, gelu

    x = x.astype(np.float64)
    return x + gelu(depthwise3x3(x, weights["dw_w"]) + weights["dw_b"]) @ weights["pw_w"] + weights["pw_b"]


class DWSConv(Generator):
    OP = "dwsconv"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> DWSConvShape | None:
        return DWSConvShape(*spec.x.axes("NHWC"))

    def default_for(self, problem: DWSConvShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: DWSConvShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: DWSConvShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: DWSConvShape, arrays: Arrays) -> np.ndarray:
        return _reference(arrays["x"], arrays, problem)
