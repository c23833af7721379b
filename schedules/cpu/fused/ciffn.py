"""CIFFN as one kernel: x + project(redistribute(gelu(depthwise(expand(x))))).

The expanded map never leaves the cache. Two ways to split the work:

* by bands of rows: each task rolls down its band in chunks; a block of channels is expanded for the chunk, convolved
  while hot, and kept as the left operand of the projection. The last two expanded rows are carried to the next chunk.
* by channels (small maps, whose weights outweigh them): every task expands and convolves some channel blocks of a
  whole image, then, after all are done, projects some rows to some columns.

The redistribution z + g (z - s) folds into the projection: z @ (1 + g) W - s (g @ W), a rank-one term at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, cast, copy, fill, lanes_of, maximum, minimum, round_up
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.math import gelu, gelus
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives import depthwise
from schedules.machines.cpus import Isa
from schedules.spec import KernelSpec

DECOMPOSE = depthwise.TAPS + 1  # the row of the packed depthwise weights that holds the decomposition's
ROWS = DECOMPOSE + 1
CACHED = 200_000  # numbers of the expanded map that a task keeps at a time, for them to stay in its cache


@dataclass(frozen=True)
class CIFFNShape:
    n: int
    h: int
    w: int
    c: int
    e: int

    @property
    def flops(self) -> int:
        return 2 * self.n * self.h * self.w * self.e * (2 * self.c + 9 + 1)


@dataclass(frozen=True)
class Tiling:
    """`chunk` rows at a time in each of `bands` a picture, or, with bands = 0, `groups` of channel blocks."""

    bands: int
    groups: int
    chunk: int
    strip: int
    expand_rows: int
    expand_vectors: int
    project_rows: int
    project_vectors: int
    unroll: int


def _default(shape: CIFFNShape, isa: Isa, threads: int = 1) -> Tiling:
    groups = threads // math.gcd(threads, shape.n)
    bands = min(shape.h, groups)
    height = -(-shape.h // bands)
    by_channel = bands > 1 and (height + 1) * bands > 1.1 * shape.h
    turns = -(-height * shape.w * shape.e // CACHED)
    chunk = shape.h if by_channel else max(2, -(-height // turns))
    rows = shape.w * (shape.h if by_channel else min(chunk, height))
    expand, project = microkernel.tile_for(isa, rows, shape.e), microkernel.tile_for(isa, rows, shape.c)
    return Tiling(
        bands=0 if by_channel else bands,
        groups=groups,
        chunk=chunk,
        strip=min(shape.w, 7),
        expand_rows=expand.rows,
        expand_vectors=expand.vectors,
        project_rows=project.rows,
        project_vectors=project.vectors,
        unroll=4,
    )


def _tilings(shape: CIFFNShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = _default(shape, isa, threads)
        by_channel = replace(start, bands=0, groups=threads, chunk=shape.h)
        splits = [start, replace(start, chunk=max(2, start.chunk // 2)), by_channel]
        expands = microkernel.tiles(isa, shape.h * shape.w, shape.e)[:3]
        projects = microkernel.tiles(isa, shape.h * shape.w, shape.c)[:3]
        strips = {min(shape.w, strip) for strip in (4, 7)}
        for split, strip, expand, project in product(splits, strips, expands, projects):
            chosen = replace(split, strip=strip, expand_rows=expand.rows, expand_vectors=expand.vectors)
            found[replace(chosen, project_rows=project.rows, project_vectors=project.vectors)] = None
    return list(found)


class _Kernel:
    """The pieces that both ways share."""

    def __init__(self, shape: CIFFNShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        # A register tile cannot be higher than the fewest rows that a product may meet.
        whole = tiling.bands == 0 or (tiling.bands == 1 and tiling.chunk >= shape.h)
        rows = shape.w * (shape.h if whole else 1)
        self.expand = Tile(min(rows, tiling.expand_rows), tiling.expand_vectors, tiling.unroll)
        self.project = Tile(min(rows, tiling.project_rows), tiling.project_vectors, tiling.unroll)
        self.block = tiling.expand_vectors * isa.lanes
        self.blocks = microkernel.panels(shape.e, self.expand, isa)
        self.e = self.blocks * self.block
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        shape = self.shape
        project = np.zeros((self.e, shape.c), np.float32)
        project[: shape.e] = (1 + weights["g"])[:, None] * weights["pr_w"]
        rows = [*weights["dw_w"].reshape(9, shape.e), weights["dw_b"], weights["dec_w"].reshape(shape.e)]
        return [
            microkernel.pack(weights["ex_w"], self.expand, self.isa),
            depthwise.pack([weights["ex_b"]], self.block),
            depthwise.pack(rows, self.block),
            np.asarray(weights["dec_b"], np.float32).reshape(1),
            microkernel.pack(project, self.project, self.isa),
            np.stack([weights["pr_b"], weights["g"] @ weights["pr_w"]]).astype(np.float32),
        ]

    def function(self) -> tirx.PrimFunc:
        shape, b = self.shape, self.b
        image = (shape.n, shape.h, shape.w, shape.c)
        width = self.project.vectors * self.isa.lanes
        self.x = b.param("x", image)
        self.expand_w = b.param("expand_w", (self.blocks, shape.c, self.block))
        self.expand_b = b.param("expand_b", (self.blocks, 1, self.block))
        self.depth_w = b.param("depth_w", (self.blocks, ROWS, self.block))
        self.decompose_b = b.param("decompose_b", (1,))
        panels = microkernel.panels(shape.c, self.project, self.isa)
        self.project_w = b.param("project_w", (panels, self.e, width))
        self.project_b = b.param("project_b", (2, shape.c))
        self.out = b.param("out", image)
        if self.tiling.bands:
            self._by_bands()
        else:
            self._by_channels()
        return b.function("ciffn")

    def _by_bands(self) -> None:
        shape, b, bands = self.shape, self.b, self.tiling.bands
        with b.loop("task", shape.n * bands, "parallel") as task:
            image = b.compute_once("image", task // bands)
            band = b.compute_once("band", task % bands)
            first = b.compute_once("first", band * shape.h // bands)
            last = b.compute_once("last", (band + 1) * shape.h // bands)
            self._band(image, first, last)

    def _band(self, image: Expr, first: Expr, last: Expr) -> None:
        """Rows first .. last of one image, from expanded rows top .. bottom."""
        shape, b, lanes, chunk = self.shape, self.b, self.isa.lanes, self.tiling.chunk
        line = shape.w * self.block
        top = b.compute_once("top", maximum(first - 1, 0))
        bottom = b.compute_once("bottom", minimum(last + 1, shape.h))
        chunks = (bottom - top + chunk - 1) // chunk
        once = isinstance(chunks, int) and chunks == 1
        hidden = b.alloc("hidden", (chunk + 3) * line)
        # The first chunk's extra row: a band's end has one more row of results than a chunk has expanded rows.
        z = b.alloc("z", self.blocks * (chunk + 1) * line)
        score = b.alloc("score", round_up((chunk + 1) * shape.w, lanes) * lanes, dtype="float32")
        carried = None
        if not once:
            carried = b.alloc("carried", self.blocks * 2 * line)
            fill(b, lanes, carried, 0, self.blocks * 2 * line)
        with b.loop("chunk", chunks) as index:
            low = b.compute_once("low", top + index * chunk)
            high = b.compute_once("high", minimum(low + chunk, bottom))
            begin = b.compute_once("begin", maximum(low - 1, first))
            end = b.compute_once("end", last if once else tirx.Select(high == bottom, last, high - 1))
            fill(b, lanes, score, 0, (chunk + 1) * shape.w * lanes)
            with b.loop("block", self.blocks) as block:
                self._expanded(block, image, low, high, hidden, carried)
                with b.loop("y", end - begin) as y:
                    self._convolved(block, hidden, begin + y - low + 1, y, z, (chunk + 1) * shape.w, score)
            position = b.compute_once("position", (image * shape.h + begin) * shape.w)
            rows = b.compute_once("rows", (end - begin) * shape.w)
            if once:
                self._projected(z, (chunk + 1) * shape.w, 0, score, 0, 1, position, rows)
            else:
                with b.when(rows > 0):
                    self._projected(z, (chunk + 1) * shape.w, 0, score, 0, 1, position, rows)

    def _expanded(
        self, block: Expr, image: Expr, low: Expr, high: Expr, hidden: Buffer, carried: Buffer | None
    ) -> None:
        """Expanded rows low .. high of a block, from row 2 of `hidden` on; the two before them are in rows 0 and 1."""
        shape, b, lanes = self.shape, self.b, self.isa.lanes
        line = shape.w * self.block
        if carried is None:
            fill(b, lanes, hidden, line, line)
        else:
            copy(b, lanes, carried, block * 2 * line, hidden, 0, 2 * line)
        start = b.compute_once("start", (image * shape.h + low) * shape.w)
        a = Rows(self.x, lambda row: (start + row) * shape.c, ((shape.c, 1),))

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            bias = b.load(self.expand_b, column, lanes_of(value))
            b.store(hidden, (row + 2 * shape.w) * self.block + column - block * self.block, value + bias)

        rows = b.compute_once("rows", (high - low) * shape.w)
        padded = self.e  # the weights beyond e are zeros, and so are the results
        microkernel.gemm(b, self.isa, self.expand, a, self.expand_w, rows, padded, finish, (block, 1))
        count = high - low
        if carried is None:
            fill(b, lanes, hidden, (count + 2) * line, line)
        else:
            with b.when(high == shape.h):
                fill(b, lanes, hidden, (count + 2) * line, line)
            copy(b, lanes, hidden, count * line, carried, block * 2 * line, 2 * line)

    def _convolved(
        self,
        block: Expr,
        hidden: Buffer,
        row: Expr,
        y: Expr,
        z: Buffer,
        rows: Expr,
        score: Buffer,
        at: Expr = 0,
        base: Expr = 0,
    ) -> None:
        """z = gelu(depthwise(hidden)) of one row, and its share of the score z . decompose."""
        shape, b, lanes = self.shape, self.b, self.isa.lanes
        taps = b.compute_once("taps", block * ROWS * self.block)
        place = b.compute_once("place", base + block * rows + y * shape.w)
        sums = b.compute_once("sums", at + y * shape.w)

        def finish(x: Expr, channel: Expr, values: list[Expr]) -> None:
            factor = b.bind("factor", b.load(self.depth_w, taps + DECOMPOSE * self.block + channel, lanes))
            for i, result in enumerate(gelus(b, values)):
                b.store(z, (place + x + i) * self.block + channel, result)
                total = b.load(score, (sums + x + i) * lanes, lanes, "float32")
                b.store(score, (sums + x + i) * lanes, total + cast(result * factor, "float32"))

        top = b.compute_once("above", row * shape.w * self.block)
        depthwise.depthwise_row(
            b, self.isa, hidden, top, shape.w, self.block, self.depth_w, taps, self.tiling.strip, finish
        )

    def _projected(
        self,
        z: Buffer,
        pitch: int,
        offset: Expr,
        score: Buffer,
        at: Expr,
        groups: int,
        position: Expr,
        rows: Expr,
        some: tuple[Expr, Expr] | None = None,
    ) -> None:
        """out = x + z @ project + bias - s * redistributed, for the positions from `position` on."""
        shape, b = self.shape, self.b
        s = self._scores(score, at, groups, pitch, rows)
        a = Rows(z, lambda row: (offset + row) * self.block, ((self.blocks, pitch * self.block), (self.block, 1)))

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            lanes = lanes_of(value)
            place = b.compute_once("place", (position + row) * shape.c + column)
            bias = b.load(self.project_b, column, lanes)
            away = b.splat(b.load(s, row), lanes) * b.load(self.project_b, shape.c + column, lanes)
            b.store(self.out, place, b.load(self.x, place, lanes) + bias - away + value)

        microkernel.gemm(b, self.isa, self.project, a, self.project_w, rows, shape.c, finish, some)

    def _scores(self, score: Buffer, at: Expr, groups: int, pitch: int, rows: Expr) -> Buffer:
        """s = gelu(z . decompose + b) of every position, from float32 sums that are spread over lanes and groups."""
        b, lanes = self.b, self.isa.lanes
        s = b.alloc("s", round_up(pitch, lanes))
        with b.loop("row", rows) as row:
            total = b.load(self.decompose_b, 0, dtype="float32")
            for group in range(groups):
                for lane in range(lanes):
                    total = total + b.load(score, (at + group * pitch + row) * lanes + lane, dtype="float32")
            b.store(s, row, total)
        with b.loop("vector", (rows + lanes - 1) // lanes) as vector:
            b.store(s, vector * lanes, gelu(b, b.load(s, vector * lanes, lanes)))
        return s

    def _by_channels(self) -> None:
        """First every channel block of every image, then every part of the result."""
        shape, b, lanes, groups = self.shape, self.b, self.isa.lanes, self.tiling.groups
        whole = shape.h * shape.w
        z = b.alloc("z", shape.n * self.blocks * whole * self.block)
        score = b.alloc("score", shape.n * groups * whole * lanes, dtype="float32")
        with b.loop("task", shape.n * groups, "parallel") as task:
            image, group = b.compute_once("image", task // groups), b.compute_once("group", task % groups)
            hidden = b.alloc("hidden", (shape.h + 3) * shape.w * self.block)
            first = b.compute_once("first", group * self.blocks // groups)
            last = b.compute_once("last", (group + 1) * self.blocks // groups)
            fill(b, lanes, score, task * whole * lanes, whole * lanes)
            with b.loop("index", last - first) as index:
                block = b.compute_once("block", first + index)
                self._expanded(block, image, 0, shape.h, hidden, None)
                with b.loop("y", shape.h) as y:
                    place = image * self.blocks * whole
                    self._convolved(block, hidden, y + 1, y, z, whole, score, task * whole, place)
        parts, across = self._parts()
        panels = microkernel.panels(shape.c, self.project, self.isa)
        with b.loop("part", shape.n * groups, "parallel") as part:
            image = b.compute_once("image", part // groups)
            row, column = b.compute_once("row", part % groups // across), b.compute_once("column", part % across)
            first = b.compute_once("first", row * whole // parts)
            last = b.compute_once("last", (row + 1) * whole // parts)
            left = b.compute_once("left", column * panels // across)
            right = b.compute_once("right", (column + 1) * panels // across)
            some = None if across == 1 else (left, right - left)
            offset = b.compute_once("offset", image * self.blocks * whole + first)
            sums = b.compute_once("sums", image * groups * whole + first)
            position = b.compute_once("position", image * whole + first)
            self._projected(z, whole, offset, score, sums, groups, position, last - first, some)

    def _parts(self) -> tuple[int, int]:
        """How many parts of the rows times how many of the columns make `groups` of the most even work."""
        whole, groups = self.shape.h * self.shape.w, self.tiling.groups
        panels = microkernel.panels(self.shape.c, self.project, self.isa)

        def longest(parts: int) -> tuple[int, int]:
            tiles = math.ceil(math.ceil(whole / parts) / self.project.rows)
            return tiles * math.ceil(panels / (groups // parts)), parts

        fits = [p for p in range(1, groups + 1) if groups % p == 0 and whole // p >= self.project.rows]
        parts = min(fits, key=longest)
        return parts, groups // parts


def _reference(x: np.ndarray, weights: Arrays, shape: CIFFNShape) -> np.ndarray:
    from schedules.cpu.reference import depthwise3x3, gelu

    x = x.astype(np.float64)
    hidden = x @ weights["ex_w"] + weights["ex_b"]
    z = gelu(depthwise3x3(hidden, weights["dw_w"]) + weights["dw_b"])
    s = gelu(z @ weights["dec_w"].reshape(shape.e, 1) + weights["dec_b"])
    return x + (z + weights["g"] * (z - s)) @ weights["pr_w"] + weights["pr_b"]


class CIFFN(Generator):
    OP = "ciffn"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> CIFFNShape | None:
        n, h, w, c = spec.x.axes("NHWC")
        return CIFFNShape(n, h, w, c, e=spec.weight("ex_b").shape[0])

    def default_for(self, problem: CIFFNShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: CIFFNShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: CIFFNShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: CIFFNShape, arrays: Arrays) -> np.ndarray:
        return _reference(arrays["x"], arrays, problem)
