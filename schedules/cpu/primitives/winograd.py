"""A 3x3 convolution of stride 1 by Winograd's minimal filtering: 2.25 or 4 times fewer products.

A square of results comes from a square of the input that is two wider. Both are turned into another basis, in which
a convolution is a product place by place, hence one matrix product for each place of the square; the weights are
turned beforehand (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015). The points of the
basis are small and unlike: with 1/2 and -2 for 2 and -2, the error of squares of four is three times that of the
direct sum instead of five times.

What is not a number in a square of the input makes all of that square's results not a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tvm import tirx

from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, fill, integer, minimum
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives import operands
from schedules.cpu.primitives.conv_shape import ConvShape, Tiling
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.unrolling import even, part
from schedules.machines.cpus import Isa

Matrix = Sequence[Sequence[float]]


class Basis(NamedTuple):
    """How squares are turned, each side by itself: of the input, of the weights, and back."""

    input: Matrix
    weight: Matrix
    result: Matrix


BASES = {
    2: Basis(
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, 1]],
    ),
    4: Basis(
        [
            [2, -3, -4, 3, 2, 0],
            [0, -2, 1, 5, 2, 0],
            [0, -2, 5, -1, -2, 0],
            [0, 2, 1, -2, -1, 0],
            [0, 1, -2, -1, 2, 0],
            [0, 2, -3, -4, 3, 2],
        ],
        [
            [1 / 2, 0, 0],
            [1 / 6, 1 / 6, 1 / 6],
            [1 / 6, -1 / 6, 1 / 6],
            [16 / 15, 8 / 15, 4 / 15],
            [1 / 30, -1 / 15, 2 / 15],
            [0, 0, 1 / 2],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 1 / 2, -2, 0], [0, 1, 1, 1 / 4, 4, 0], [0, 1, -1, 1 / 8, -8, 1]],
    ),
}
SQUARES = tuple(BASES)
SCRATCH = 1 << 16  # numbers: what the turned squares of a chunk may take of a second-level cache
CACHED = 1 << 18  # numbers: weights beyond it come from the memory, for each chunk again
FETCHED = 3  # numbers that come from there in a cycle
PAYS = 0.85  # of the direct sum's cycles: it takes more memory, too


def can(shape: ConvShape, isa: Isa) -> bool:
    """In float32 alone, whose rounding it triples, and where sums may round at all."""
    plain = shape.kernel == (3, 3) and shape.strides == shape.dilation == (1, 1) and shape.parts == 1
    wide = min(shape.c, shape.k) >= isa.lanes
    return plain and wide and not (shape.channels_first or shape.exact) and isa.dtype == isa.stored == "float32"


def pays(shape: ConvShape, isa: Isa, threads: int) -> Tiling | None:
    """The squares that take the fewest cycles, if these are clearly fewer than the direct sum's."""
    if not can(shape, isa):
        return None
    positions = shape.n * shape.out_h * shape.out_w
    direct = _products(shape, isa, positions, 9, threads)
    cycles = {square: _cycles(shape, isa, square, threads) for square in SQUARES}
    square = min(cycles, key=lambda each: cycles[each])
    return tiling(shape, isa, threads, square) if cycles[square] < PAYS * direct else None


def _cycles(shape: ConvShape, isa: Isa, square: int, threads: int) -> float:
    """Of a thread."""
    wide, count = square + 2, _squares(shape, square)
    turned = sum(
        -(-channels // isa.lanes) * (steps + wide * wide)  # every step is an addition, every place is stored
        for channels, steps in (
            (shape.c, 2 * wide * _filled(BASES[square].input)),
            (shape.k, (wide + square) * _filled(BASES[square].result)),
        )
    )
    return _products(shape, isa, count, wide * wide, threads) + count * turned / threads


def _products(shape: ConvShape, isa: Isa, rows: int, places: int, threads: int) -> float:
    """Rows times the weights of so many places, for a thread: to multiply, and to fetch its part of the weights."""
    multiplied = rows * places * shape.c * -(-shape.k // isa.lanes) / isa.core.multiplies
    weights = places * shape.c * shape.k
    return (multiplied + (weights / FETCHED if weights > CACHED else 0)) / threads


def _filled(matrix: Matrix) -> int:
    return sum(value != 0 for row in matrix for value in row)


def _across(shape: ConvShape, square: int) -> tuple[int, int]:
    """Squares that cover the results: down and across."""
    return -(-shape.out_h // square), -(-shape.out_w // square)


def _squares(shape: ConvShape, square: int) -> int:
    down, across = _across(shape, square)
    return shape.n * down * across


def tiling(shape: ConvShape, isa: Isa, threads: int, square: int) -> Tiling:
    """Threads share the squares; or the weights, where these are what takes the time, and all squares pass at once."""
    count, places = _squares(shape, square), (square + 2) ** 2
    large = places * shape.c * shape.k > CACHED
    most = (8 if large else 1) * SCRATCH // (places * (shape.c + shape.k))
    groups = min(threads, shape.k // (2 * isa.lanes)) if large else 1
    bands = min(count, threads // groups)
    chunk = even(-(-count // bands), max(most, 12))  # register tiles are half a dozen rows at the least
    tile = microkernel.tile_for(isa, chunk, shape.k // groups)
    if large:  # a panel is read again for every tile of rows: few of those, and panels that a cache holds
        tile = Tile(min(chunk, 8), 2)
    return Tiling(bands, groups, chunk, tile.rows, tile.vectors, 4, square)


class Winograd:
    def __init__(self, shape: ConvShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        self.basis, self.square, self.wide = BASES[tiling.square], tiling.square, tiling.square + 2
        self.down, self.across = _across(shape, tiling.square)
        self.count = _squares(shape, tiling.square)
        self.chunk = min(tiling.chunk, -(-self.count // tiling.bands))
        self.tile = Tile(min(self.chunk, tiling.rows), tiling.vectors, tiling.unroll)
        self.panels = microkernel.panels(shape.k, self.tile, isa)
        # The last vector of a group is moved back, so that its channels have to fill one.
        rest = shape.k % (self.tile.vectors * isa.lanes)
        self.groups = 1 if 0 < rest < isa.lanes else min(tiling.groups, self.panels)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        turn = np.asarray(self.basis.weight, np.float64)
        turned = np.einsum("ia,abck,jb->ijck", turn, weights["w"].astype(np.float64), turn)
        own = [microkernel.pack(each, self.tile, self.isa) for each in turned.reshape(-1, self.shape.c, self.shape.k)]
        return [np.concatenate(own), *operands.constants(self.shape.epilogue, weights)]

    def function(self) -> tirx.PrimFunc:
        shape, b, tiling = self.shape, self.b, self.tiling
        places = self.wide * self.wide
        self.x = b.param("x", shape.image)
        self.ending = Ending(b, shape.epilogue, shape.result, shape.gates)
        self.weight = b.param("weight", (places * self.panels, shape.c, self.tile.vectors * self.isa.lanes))
        self.ending.declare_weights()
        self.out = b.param("out", shape.result)
        with b.loop("task", tiling.bands * self.groups, "parallel") as task:
            first, size = part(b, b.compute_once("band", task // self.groups), self.count, tiling.bands)
            group = b.compute_once("group", task % self.groups)
            self.begin = b.compute_once("begin", group * self.panels // self.groups)
            self.end = b.compute_once("end", (group + 1) * self.panels // self.groups)
            seen = b.alloc("seen", places * self.chunk * shape.c)
            made = b.alloc("made", places * self.chunk * shape.k)
            self.patch = b.alloc("patch", places * shape.c)
            self.half = b.alloc("half", places * self.isa.lanes)
            with b.loop("chunk", -(-size // self.chunk)) as index:
                low = b.compute_once("low", first + minimum(index * self.chunk, size - self.chunk))
                with b.loop("square", self.chunk) as at:
                    self._seen(self._corner(low + at), seen, at)
                with b.loop("place", places) as place:
                    self._multiplied(place, seen, made)
                with b.loop("square", self.chunk) as at:
                    self._made(self._corner(low + at), made, at)
        return b.function("winograd")

    def _corner(self, number: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, row and column where the results of a square begin."""
        b, each = self.b, self.down * self.across
        image = b.compute_once("image", number // each)
        within = b.compute_once("within", number % each)
        y = b.compute_once("y", within // self.across * self.square)
        return image, y, b.compute_once("x", within % self.across * self.square)

    def _seen(self, corner: tuple[Expr, Expr, Expr], seen: Buffer, at: Expr) -> None:
        """Turn what a square sees; at the edges from a copy with zeros around."""
        shape, b, wide = self.shape, self.b, self.wide
        image, y, x = corner
        top = b.compute_once("top", y - shape.padding[0])
        left = b.compute_once("left", x - shape.padding[1])
        inside = tirx.all(
            integer(top) >= 0, integer(left) >= 0, integer(top) + wide <= shape.h, integer(left) + wide <= shape.w
        )
        start = b.compute_once("start", ((image * shape.h + top) * shape.w + left) * shape.c)
        with b.when(inside):
            self._turned_input(self.x, start, shape.w * shape.c, seen, at)
        with b.when(tirx.Not(inside)):
            with b.loop("row", wide) as row, b.loop("column", wide) as column:
                there = b.compute_once("there", (row * wide + column) * shape.c)
                v, u = integer(top) + row, integer(left) + column
                within = tirx.all(v >= 0, v < shape.h, u >= 0, u < shape.w)
                with b.when(within):
                    source = b.compute_once("source", start + (row * shape.w + column) * shape.c)
                    self._vectors(
                        0, shape.c, lambda c: b.store(self.patch, there + c, b.load(self.x, source + c, self.isa.lanes))
                    )
                with b.when(tirx.Not(within)):
                    fill(b, self.isa.lanes, self.patch, there, shape.c)
            self._turned_input(self.patch, 0, wide * shape.c, seen, at)

    def _turned_input(self, source: Buffer, start: Expr, pitch: int, seen: Buffer, at: Expr) -> None:
        shape, wide = self.shape, self.wide

        def load(row: int, column: Expr, channel: Expr) -> Expr:
            return self.b.load(source, start + row * pitch + column * shape.c + channel, self.isa.lanes)

        def store(row: Expr, column: int, channel: Expr, value: Expr) -> None:
            place = ((row * wide + column) * self.chunk + at) * shape.c + channel
            self.b.store(seen, place, value)

        self._vectors(0, shape.c, lambda channel: self._turned(self.basis.input, channel, load, store, wide))

    def _turned(
        self,
        by: Matrix,
        channel: Expr,
        load: Callable[[int, Expr, Expr], Expr],
        store: Callable[[Expr, int, Expr, Expr], None],
        rows: Expr,
    ) -> None:
        """A vector of channels of a square: first every column, then as many rows of the outcome as are wanted."""
        b, lanes, half = self.b, self.isa.lanes, self.half
        with b.loop("column", self.wide) as column:
            values = [b.bind("value", load(row, column, channel)) for row in range(self.wide)]
            for row, factors in enumerate(by):
                b.store(half, (row * self.wide + column) * lanes, self._sum(factors, values))
        with b.loop("row", rows) as row:
            values = [
                b.bind("value", b.load(half, (row * self.wide + column) * lanes, lanes)) for column in range(self.wide)
            ]
            for column, factors in enumerate(by):
                store(row, column, channel, self._sum(factors, values))

    def _sum(self, factors: Sequence[float], values: Sequence[Expr]) -> Expr:
        """Positive ones first, so that it begins with no negation."""
        terms = sorted(((f, v) for f, v in zip(factors, values, strict=True) if f), key=lambda term: term[0] < 0)
        total: Expr = None
        for factor, value in terms:
            term = value if abs(factor) == 1 else value * self.b.splat(float(abs(factor)), self.isa.lanes)
            total = term if total is None else total + term if factor > 0 else total - term
        return total

    def _vectors(self, begin: Expr, end: Expr, body: Callable[[Expr], None]) -> None:
        """The body for the first channel of every vector, the last of which is moved back to end where they end."""
        lanes = self.isa.lanes
        with self.b.loop("vector", (end - begin + lanes - 1) // lanes) as vector:
            body(self.b.compute_once("channel", minimum(begin + vector * lanes, end - lanes)))

    def _multiplied(self, place: Expr, seen: Buffer, made: Buffer) -> None:
        """What was seen at one place of every square, times the weights of this place."""
        shape, b = self.shape, self.b
        begin = b.compute_once("begin", place * self.chunk)

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            b.store(made, (begin + row) * shape.k + column, value)

        some = None if self.groups == 1 else (self.begin, self.end - self.begin)
        a = Rows(seen, lambda row: (begin + row) * shape.c, ((shape.c, 1),))
        own = b.compute_once("own", place * (self.panels * shape.c * self.tile.vectors * self.isa.lanes))
        microkernel.gemm(
            b, self.isa, self.tile, a, self.weight, self.chunk, shape.k, finish, some, most=self.chunk, begin=own
        )

    def _made(self, corner: tuple[Expr, Expr, Expr], made: Buffer, at: Expr) -> None:
        """Turn the products of a square back, and store what of its results there is."""
        shape, b, square = self.shape, self.b, self.square
        image, y, x = corner
        target = b.compute_once("target", (image * shape.out_h + y) * shape.out_w + x)
        rows = minimum(square, shape.out_h - y) if shape.out_h % square else square
        rows = b.compute_once("rows", rows)

        def load(row: int, column: Expr, channel: Expr) -> Expr:
            place = ((row * self.wide + column) * self.chunk + at) * shape.k + channel
            return b.load(made, place, self.isa.lanes)

        def store(row: Expr, column: int, channel: Expr, value: Expr) -> None:
            def stored() -> None:
                place = b.compute_once("result", (target + row * shape.out_w + column) * shape.k + channel)
                b.store(self.out, place, self.ending.done(b.bind("total", value), Spot(place, channel, image)))

            if shape.out_w % square:
                with b.when(integer(x) + column < shape.out_w):
                    stored()
            else:
                stored()

        width = self.tile.vectors * self.isa.lanes
        own = (0, shape.k)
        if self.groups > 1:
            ends = minimum(self.end * width, shape.k)
            own = b.compute_once("from", self.begin * width), b.compute_once("to", ends)
        self._vectors(*own, lambda channel: self._turned(self.basis.result, channel, load, store, rows))
