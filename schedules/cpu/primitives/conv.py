"""A convolution as an implicit matrix product: any kernel, strides, padding, dilation and groups, with its epilogue.

Each task takes rows of results in chunks and copies the input rows they need into a padded patch, where the window of
a result is `kh` runs of kw * Cin neighbouring numbers: the depth of the product, without an im2col. Of several groups
each has a product of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, copy, fill, integer, minimum
from schedules.cpu.generator import Arrays, Generator, Loops
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives import operands, windows, winograd
from schedules.cpu.primitives.conv_shape import ConvShape, Tiling
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.machines.cpus import Isa
from schedules.spec import KernelSpec

PATCH = 1 << 16  # numbers: what a patch may take of the cache


def _default(shape: ConvShape, isa: Isa, threads: int = 1) -> Tiling:
    return winograd.pays(shape, isa, threads) or _direct(shape, isa, threads)


def _direct(shape: ConvShape, isa: Isa, threads: int) -> Tiling:
    needed = threads // math.gcd(threads, shape.n)
    bands = min(shape.out_h, needed) if shape.out_h >= 4 * needed else 1
    chunk = max(1, min(-(-shape.out_h // bands), PATCH // (shape.strides[0] * shape.line)))
    tile = microkernel.tile_for(isa, chunk * shape.out_w, shape.columns)
    groups = 1 if bands >= needed else min(needed, _divisible(shape, tile, isa))
    return Tiling(bands, groups, chunk, tile.rows, tile.vectors, 4)


def _divisible(shape: ConvShape, tile: Tile, isa: Isa) -> int:
    """Into how many pieces the channels can be divided: groups, or panels where there is one group."""
    return shape.parts if shape.parts > 1 else microkernel.panels(shape.k, tile, isa)


def _tilings(shape: ConvShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        for square in winograd.SQUARES if winograd.can(shape, isa) else ():
            found[winograd.tiling(shape, isa, threads, square)] = None
        start = _direct(shape, isa, threads)
        chunks = {start.chunk, -(-start.chunk // 2), -(-start.chunk // 4)}
        best = microkernel.tiles(isa, shape.out_h * shape.out_w, shape.columns)[:5]
        for chunk, tile, unroll in product(sorted(chunks), best, (3, 4, 8)):
            found[replace(start, chunk=chunk, rows=tile.rows, vectors=tile.vectors, unroll=unroll)] = None
    return list(found)


class _Kernel:
    def __init__(self, shape: ConvShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        # A register tile cannot be higher than the fewest rows that a product may meet.
        rows = shape.out_w * (shape.out_h if tiling.bands == 1 and tiling.chunk >= shape.out_h else 1)
        self.tile = Tile(min(rows, tiling.rows), tiling.vectors, tiling.unroll)
        self.panels = microkernel.panels(shape.columns, self.tile, isa)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        flat = weights["w"].reshape(self.shape.depth, self.shape.k)
        own = [microkernel.pack(part, self.tile, self.isa) for part in np.split(flat, self.shape.parts, axis=1)]
        return [np.concatenate(own), *operands.constants(self.shape.epilogue, weights)]

    def function(self) -> tirx.PrimFunc:
        shape, b, tiling = self.shape, self.b, self.tiling
        self.x = b.param("x", shape.image, "float32" if shape.channels_first else None)
        self.ending = Ending(b, shape.epilogue, shape.result, shape.gates)
        width = self.tile.vectors * self.isa.lanes
        self.weight = b.param("weight", (shape.parts * self.panels, shape.depth, width))
        self.ending.declare_weights()
        self.out = b.param("out", shape.result)
        with b.loop("task", shape.n * tiling.bands * tiling.groups, "parallel") as task:
            group = b.compute_once("group", task % tiling.groups)
            band = b.compute_once("band", task // tiling.groups % tiling.bands)
            image = b.compute_once("image", task // (tiling.groups * tiling.bands))
            first = b.compute_once("first", band * shape.out_h // tiling.bands)
            last = b.compute_once("last", (band + 1) * shape.out_h // tiling.bands)
            pieces = _divisible(shape, self.tile, self.isa)
            begin = b.compute_once("begin", group * pieces // tiling.groups)
            end = b.compute_once("end", (group + 1) * pieces // tiling.groups)
            self._band(image, first, last, None if tiling.groups == 1 else (begin, end - begin))
        return b.function("conv")

    def _band(self, image: Expr, first: Expr, last: Expr, some: tuple[Expr, Expr] | None) -> None:
        """Rows first .. last of the results of one image, `chunk` at a time."""
        shape, b, chunk = self.shape, self.b, self.tiling.chunk
        lines = (chunk - 1) * shape.strides[0] + shape.span[0]
        patch = None if shape.in_place else b.alloc("patch", lines * shape.line)
        with b.loop("chunk", (last - first + chunk - 1) // chunk) as index:
            low = b.compute_once("low", first + index * chunk)
            count = b.compute_once("count", minimum(chunk, last - low))
            if patch is None:
                begin = b.compute_once("begin", (image * shape.h + low) * shape.line)
                self._multiplied(image, low, count, self.x, begin, some)
            else:
                self._gathered(image, low, count, patch)
                self._multiplied(image, low, count, patch, 0, some)

    def _gathered(self, image: Expr, low: Expr, count: Expr, patch: Buffer) -> None:
        """The input rows that `count` rows of results from `low` on see, with zeros all around."""
        shape, b, lanes = self.shape, self.b, self.isa.lanes
        (above, left, _, right), width = shape.padding, shape.w * shape.c
        with b.loop("row", (count - 1) * shape.strides[0] + shape.span[0]) as row:
            y = b.compute_once("y", low * shape.strides[0] - above + row)
            start = b.compute_once("start", row * shape.line)
            inside = tirx.all(integer(y) >= 0, integer(y) < shape.h)
            with b.when(inside):
                fill(b, lanes, patch, start, left * shape.c)
                self._copied(image, y, patch, start + left * shape.c)
                fill(b, lanes, patch, start + left * shape.c + width, right * shape.c)
            with b.when(tirx.Not(inside)):
                fill(b, lanes, patch, start, shape.line)

    def _copied(self, image: Expr, y: Expr, patch: Buffer, start: Expr) -> None:
        """Row y of the input."""
        shape, b = self.shape, self.b
        if not shape.channels_first:
            width = shape.w * shape.c
            return copy(b, self.isa.lanes, self.x, (image * shape.h + y) * width, patch, start, width)
        with b.loop("at", shape.w) as at:
            for channel in range(shape.c):
                place = ((image * shape.c + channel) * shape.h + y) * shape.w + at
                b.store(patch, start + at * shape.c + channel, b.load(self.x, place))
        return None

    def _multiplied(
        self, image: Expr, low: Expr, count: Expr, seen: Buffer, begin: Expr, some: tuple[Expr, Expr] | None
    ) -> None:
        """`count` rows of results from `low` on, whose windows lie in seen[begin..]; of some panels or groups only."""
        if self.shape.parts == 1:
            return self._product(image, low, count, seen, begin, some, 0)
        first, number = some or (0, self.shape.parts)
        with self.b.loop("part", number) as index:
            part = self.b.compute_once("part", first + index)
            self._product(image, low, count, seen, begin, None, part)
        return None

    def _product(
        self,
        image: Expr,
        low: Expr,
        count: Expr,
        seen: Buffer,
        begin: Expr,
        some: tuple[Expr, Expr] | None,
        part: Expr,
    ) -> None:
        """Of one group of channels."""
        shape, b, (down, across) = self.shape, self.b, self.shape.strides
        begin = begin + part * (shape.c // shape.parts)
        position = b.compute_once("position", (image * shape.out_h + low) * shape.out_w)

        def start(row: Expr) -> Expr:
            if shape.in_place:
                return begin + row * shape.c
            y, x = row // shape.out_w * shape.line, row % shape.out_w * shape.c
            return begin + ((y + x) * down if down == across else y * down + x * across)

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            channel = part * shape.columns + column
            place = (position + row) * shape.k + channel
            if self.ending.others:
                place = b.compute_once("place", place)
            b.store(self.out, place, self.ending.done(value, Spot(place, channel, image)))

        a = Rows(seen, start, self._depth())
        rows = b.compute_once("rows", count * shape.out_w)
        most = min(self.tiling.chunk, -(-shape.out_h // self.tiling.bands)) * shape.out_w
        own = part * (self.panels * shape.depth * self.tile.vectors * self.isa.lanes)
        microkernel.gemm(b, self.isa, self.tile, a, self.weight, rows, shape.columns, finish, some, most, own)

    def _depth(self) -> tuple[tuple[int, int], ...]:
        """The window of a result in the patch: runs of neighbours, or of pixels where dilation leaves some out."""
        shape, (high, wide), (down, across) = self.shape, self.shape.kernel, self.shape.dilation
        seen = shape.c // shape.parts
        joined = across == 1 and shape.parts == 1
        within = ((wide * seen, 1),) if joined else ((wide, across * shape.c), (seen, 1))
        return ((high, down * shape.line), *within)


def _reference(shape: ConvShape, arrays: Arrays) -> np.ndarray:
    x = np.asarray(arrays["x"])
    x = x.transpose(0, 2, 3, 1) if shape.channels_first else x
    weights = np.split(arrays["w"], shape.parts, axis=3)
    channels = np.split(x, shape.parts, axis=3)
    groups = [
        sum((seen @ w[i, j] for i, j, seen in windows.taps(shape, part)), np.zeros((*shape.result[:3], shape.columns)))
        for w, part in zip(weights, channels, strict=True)
    ]
    out = np.concatenate(groups, axis=3)
    return activations.reference(shape.epilogue.steps, out, dict(arrays))


class Conv(Generator):
    OP = "conv"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> ConvShape | None:
        n, h, w, c = spec.x.axes("NHWC")
        high, wide, within, k = spec.weight("w").shape
        parts = spec["groups"]
        if within * parts != c or not operands.fit(spec, gated=True):
            return None
        strides, padding, dilation = (spec[name] for name in ("strides", "padding", "dilation"))
        picture = spec.x.layout == "NCHW"
        return ConvShape(
            *(n, h, w, c, (high, wide), strides, padding, dilation),
            k=k,
            epilogue=spec.epilogue,
            gates=operands.gates(spec),
            parts=parts,
            exact=spec["exact"],
            channels_first=picture,
        )

    def default_for(self, problem: ConvShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: ConvShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: ConvShape, unit: Isa, tiling: Tiling, threads: int) -> Loops:
        return winograd.Winograd(problem, unit, tiling) if tiling.square else _Kernel(problem, unit, tiling)

    def reference_for(self, problem: ConvShape, arrays: Arrays) -> np.ndarray:
        return _reference(problem, arrays)
