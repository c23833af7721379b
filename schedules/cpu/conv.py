"""A dense convolution as an implicit matrix product: KxK, any stride and padding, bias and perhaps GELU.

Each task takes rows of results in chunks and copies the input rows they need into a padded patch, where the window of
a result is `kh` runs of kw * Cin neighbouring numbers: the depth of the product, without an im2col.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, copy, fill, integer, lanes_of, minimum
from schedules.cpu.isa import Isa
from schedules.cpu.lowered import any_shape, generator
from schedules.cpu.math import gelu
from schedules.cpu.microkernel import Rows, Tile

PATCH = 1 << 16  # numbers: what a patch may take of the cache


@dataclass(frozen=True)
class ConvShape:
    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: int
    stride: int
    padding: int
    activation: str | None = None
    channels_first: bool = False  # the input is a picture, as it comes from outside: of float32 in any case

    @property
    def image(self) -> tuple[int, ...]:
        n, h, w, c = self.n, self.h, self.w, self.c
        return (n, c, h, w) if self.channels_first else (n, h, w, c)

    @property
    def out_h(self) -> int:
        return (self.h + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def out_w(self) -> int:
        return (self.w + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def flops(self) -> int:
        return 2 * self.n * self.out_h * self.out_w * self.k * self.c * self.kernel**2


@dataclass(frozen=True)
class Tiling:
    """`bands` x `groups` tasks a picture (rows x columns), `chunk` rows of results at a time, the register tile."""

    bands: int
    groups: int
    chunk: int
    rows: int
    vectors: int
    unroll: int


def default_tiling(shape: ConvShape, isa: Isa, threads: int = 1) -> Tiling:
    needed = threads // math.gcd(threads, shape.n)
    bands = min(shape.out_h, needed) if shape.out_h >= 4 * needed else 1
    line = shape.stride * (shape.w + 2 * shape.padding) * shape.c
    chunk = max(1, min(-(-shape.out_h // bands), PATCH // line))
    tile = microkernel.tile_for(isa, chunk * shape.out_w, shape.k)
    groups = 1 if bands >= needed else min(needed, microkernel.panels(shape.k, tile, isa))
    return Tiling(bands, groups, chunk, tile.rows, tile.vectors, 4)


def tilings(shape: ConvShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = default_tiling(shape, isa, threads)
        chunks = {start.chunk, -(-start.chunk // 2), -(-start.chunk // 4)}
        best = microkernel.tiles(isa, shape.out_h * shape.out_w, shape.k)[:5]
        for chunk, tile, unroll in product(sorted(chunks), best, (3, 4, 8)):
            found[replace(start, chunk=chunk, rows=tile.rows, vectors=tile.vectors, unroll=unroll)] = None
    return list(found)


class _Kernel:
    def __init__(self, shape: ConvShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        # A register tile cannot be higher than the fewest rows that a product may meet.
        rows = shape.out_w * (shape.out_h if tiling.bands == 1 and tiling.chunk >= shape.out_h else 1)
        self.tile = Tile(min(rows, tiling.rows), tiling.vectors, tiling.unroll)
        self.depth = shape.kernel**2 * shape.c
        self.panels = microkernel.panels(shape.k, self.tile, isa)
        self.line = (shape.w + 2 * shape.padding) * shape.c
        self.b = Builder(isa.dtype, isa.stored, isa.cells)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        flat = weights["w"].reshape(self.depth, self.shape.k)
        return [microkernel.pack(flat, self.tile, self.isa), np.asarray(weights["b"], np.float32)]

    def function(self) -> tirx.PrimFunc:
        shape, b, tiling = self.shape, self.b, self.tiling
        self.x = b.param("x", shape.image, "float32" if shape.channels_first else None)
        self.weight = b.param("weight", (self.panels, self.depth, self.tile.vectors * self.isa.lanes))
        self.bias = b.param("bias", (shape.k,))
        self.out = b.param("out", (shape.n, shape.out_h, shape.out_w, shape.k))
        with b.loop("task", shape.n * tiling.bands * tiling.groups, "parallel") as task:
            group = b.compute_once("group", task % tiling.groups)
            band = b.compute_once("band", task // tiling.groups % tiling.bands)
            image = b.compute_once("image", task // (tiling.groups * tiling.bands))
            first = b.compute_once("first", band * shape.out_h // tiling.bands)
            last = b.compute_once("last", (band + 1) * shape.out_h // tiling.bands)
            begin = b.compute_once("begin", group * self.panels // tiling.groups)
            end = b.compute_once("end", (group + 1) * self.panels // tiling.groups)
            self._band(image, first, last, None if tiling.groups == 1 else (begin, end - begin))
        return b.function("conv")

    def _band(self, image: Expr, first: Expr, last: Expr, some: tuple[Expr, Expr] | None) -> None:
        """Rows first .. last of the results of one image, `chunk` at a time."""
        shape, b, chunk = self.shape, self.b, self.tiling.chunk
        patch = b.alloc("patch", ((chunk - 1) * shape.stride + shape.kernel) * self.line)
        with b.loop("chunk", (last - first + chunk - 1) // chunk) as index:
            low = b.compute_once("low", first + index * chunk)
            count = b.compute_once("count", minimum(chunk, last - low))
            self._gathered(image, low, count, patch)
            self._multiplied(image, low, count, patch, some)

    def _gathered(self, image: Expr, low: Expr, count: Expr, patch: Buffer) -> None:
        """The input rows that `count` rows of results from `low` on see, with zeros all around."""
        shape, b, lanes = self.shape, self.b, self.isa.lanes
        width, border = shape.w * shape.c, shape.padding * shape.c
        with b.loop("row", (count - 1) * shape.stride + shape.kernel) as row:
            y = b.compute_once("y", low * shape.stride - shape.padding + row)
            start = b.compute_once("start", row * self.line)
            inside = tirx.all(integer(y) >= 0, integer(y) < shape.h)
            with b.when(inside):
                fill(b, lanes, patch, start, border)
                self._copied(image, y, patch, start + border)
                fill(b, lanes, patch, start + border + width, border)
            with b.when(tirx.Not(inside)):
                fill(b, lanes, patch, start, self.line)

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

    def _multiplied(self, image: Expr, low: Expr, count: Expr, patch: Buffer, some: tuple[Expr, Expr] | None) -> None:
        shape, b = self.shape, self.b
        run = shape.kernel * shape.c
        position = b.compute_once("position", (image * shape.out_h + low) * shape.out_w)

        def start(row: Expr) -> Expr:
            return (row // shape.out_w * self.line + row % shape.out_w * shape.c) * shape.stride

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            result = value + b.load(self.bias, column, lanes_of(value))
            if shape.activation == "gelu":
                result = gelu(b, result)
            b.store(self.out, (position + row) * shape.k + column, result)

        a = Rows(patch, start, ((shape.kernel, self.line), (run, 1)))
        rows = b.compute_once("rows", count * shape.out_w)
        microkernel.gemm(b, self.isa, self.tile, a, self.weight, rows, shape.k, finish, some)


accepts = any_shape
lower = generator(_Kernel, default_tiling)


def reference(x: np.ndarray, weights: dict[str, np.ndarray], shape: ConvShape) -> np.ndarray:
    from schedules.cpu.reference import gelu

    p, s = shape.padding, shape.stride
    x = x.transpose(0, 2, 3, 1) if shape.channels_first else x
    padded = np.pad(x.astype(np.float64), ((0, 0), (p, p), (p, p), (0, 0)))
    out = np.zeros((shape.n, shape.out_h, shape.out_w, shape.k)) + weights["b"]
    for i in range(shape.kernel):
        for j in range(shape.kernel):
            window = padded[:, i : i + s * shape.out_h : s, j : j + s * shape.out_w : s][
                :, : shape.out_h, : shape.out_w
            ]
            out += window @ weights["w"][i, j]
    return gelu(out) if shape.activation == "gelu" else out
