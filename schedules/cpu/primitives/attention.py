"""Attention, tile by tile: some queries meet all keys, become shares, and mix the values.

Only the scores of a few queries are ever kept, so that they stay in the first-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, copy, minimum, round_up, splat
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.lanes import power_of_two, transposed
from schedules.cpu.primitives import operands
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.softmax import powers_of_rows, softmax
from schedules.cpu.primitives.unrolling import (
    accumulators,
    at_a_time,
    even,
    in_chunks,
    in_turns,
    multiply_add,
    sweep,
    widest,
)
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec

MOST_SCORES = 4096  # that are kept at a time: half of a first-level cache


@dataclass(frozen=True)
class Matrix:
    """Rows in a buffer: element (row, column) is buffer[row * pitch + base + column]."""

    buffer: Buffer
    pitch: int
    base: Expr = 0

    def at(self, row: Expr, column: Expr) -> Expr:
        return row * self.pitch + self.base + column


@dataclass(frozen=True)
class Keys:
    """Keys by dimension, so that a vector holds one dimension of several keys.

    One more row is what is added to every score: 0, or `beyond` after the last key.
    """

    buffer: Buffer
    count: int
    dim: int
    pitch: int

    @classmethod
    def of(cls, b: Builder, isa: Isa, count: int, dim: int) -> Keys:
        # An odd number of vectors, or else rows would compete for the same few places in the cache.
        pitch = (-(-count // isa.lanes) | 1) * isa.lanes
        return cls(b.alloc("keys", (dim + 1) * pitch), count, dim, pitch)

    def clear(self, b: Builder, isa: Isa, beyond: float) -> None:
        with b.loop("i", (self.dim + 1) * self.pitch // isa.lanes) as i:
            b.store(self.buffer, i * isa.lanes, splat(0.0, isa.lanes))
        for i in range(self.count, self.pitch):
            b.store(self.buffer, self.dim * self.pitch + i, tirx.const(beyond, "float32"))

    def turn(self, b: Builder, isa: Isa, source: Matrix) -> None:
        """Fill in the rows of a matrix."""
        size = math.gcd(self.dim, isa.lanes)
        while size > self.count:
            size //= 2
        with b.loop("block", -(-self.count // size)) as block:
            token = b.bind("token", minimum(block * size, self.count - size))
            for d in range(0, self.dim, size):
                place = source.at(token, d)
                rows = [b.bind("row", b.load(source.buffer, place + i * source.pitch, size)) for i in range(size)]
                for i, column in enumerate(transposed(b, rows)):
                    b.store(self.buffer, (d + i) * self.pitch + token, column)


def queries_at_a_time(count: int, pitch: int) -> int:
    """Queries of which the scores stay in the cache."""
    return even(count, max(8, MOST_SCORES // pitch))


def score_keys(
    b: Builder, isa: Isa, high: int, queries: Matrix, first: Expr, keys: Keys, scores: Buffer, count: int
) -> None:
    """Query times key for `count` queries from `first` on and all keys, in tiles of `high` rows."""
    lanes, pitch = isa.lanes, keys.pitch
    rows = min(high, count)

    def tile(row: Expr, start: Expr, width: int) -> None:
        sums = accumulators(b, rows, width, lanes)
        for j in range(width):
            bias = b.bind("bias", b.load(keys.buffer, keys.dim * pitch + (start + j) * lanes, lanes))
            for line in sums:
                b.store(line[j], 0, bias)

        def add(d: Expr) -> None:
            key = [b.bind("key", b.load(keys.buffer, d * pitch + (start + j) * lanes, lanes)) for j in range(width)]
            for i, line in enumerate(sums):
                value = splat(b.load(queries.buffer, queries.at(first + row + i, d)), lanes)
                multiply_add(b, line, value, key)

        in_turns(b, "d", keys.dim, add)
        for i, line in enumerate(sums):
            for j, total in enumerate(line):
                b.store(scores, (row + i) * pitch + (start + j) * lanes, b.load(total, 0, lanes))

    with b.loop("tile", -(-count // rows)) as index:
        row = b.bind("row", minimum(index * rows, count - rows))
        in_chunks(b, -(-keys.count // lanes), widest(isa, rows), lambda start, width: tile(row, start, width))


def mix_values(
    b: Builder,
    isa: Isa,
    high: int,
    scores: Matrix,
    inverse: Buffer,
    values: Matrix,
    tokens: int,
    lanes: int,
    vectors: int,
    count: int,
    finish: Callable[[Expr, Expr, Expr], None],
) -> None:
    """`vectors` of the values of all tokens, weighted by the scores of `count` queries, in tiles of `high` rows.

    `finish(row, column, value)` gets vectors of results.
    """
    rows = min(high, count)

    def tile(row: Expr, start: Expr, width: int) -> None:
        sums = accumulators(b, rows, width, lanes)
        for line in sums:
            for total in line:
                b.store(total, 0, splat(0.0, lanes))

        def add(key: Expr) -> None:
            place = values.at(key, start * lanes)
            several = [b.bind("value", b.load(values.buffer, place + j * lanes, lanes)) for j in range(width)]
            for i, line in enumerate(sums):
                multiply_add(b, line, splat(b.load(scores.buffer, scores.at(row + i, key)), lanes), several)

        in_turns(b, "key", tokens, add)
        for i, line in enumerate(sums):
            factor = b.bind("factor", splat(b.load(inverse, row + i), lanes))
            for j, total in enumerate(line):
                finish(row + i, (start + j) * lanes, b.load(total, 0, lanes) * factor)

    with b.loop("tile", -(-count // rows)) as index:
        row = b.bind("row", minimum(index * rows, count - rows))
        in_chunks(b, vectors, widest(isa, rows), lambda start, width: tile(row, start, width))


@dataclass(frozen=True)
class View:
    """Images, tokens and heads inside a tensor: where the first one begins, and how far it is from each to the next."""

    shape: tuple[int, ...]  # the tensor's
    offset: int
    image: int
    token: int
    head: int

    @classmethod
    def whole(cls, shape: tuple[int, int, int, int]) -> View:
        _, tokens, heads, width = shape
        return cls(shape, 0, tokens * heads * width, heads * width, width)

    def last(self, shape: tuple[int, int, int, int]) -> int:
        """The place of the last number."""
        images, tokens, heads, width = shape
        steps = (images - 1) * self.image + (tokens - 1) * self.token + (heads - 1) * self.head
        return self.offset + steps + width - 1

    def of(self, array: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
        flat = np.ascontiguousarray(array).reshape(-1)[self.offset :]
        strides = [step * flat.itemsize for step in (self.image, self.token, self.head, 1)]
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)


@dataclass(frozen=True)
class AttentionShape:
    n: int
    t: int  # queries
    s: int  # keys
    heads: int
    d: int  # width of a query and of a key
    dv: int  # width of a value
    scale: float
    mask: tuple[int, ...] = ()  # its four extents, some of which may be 1
    epilogue: Epilogue = field(default=Epilogue())
    views: tuple[View, ...] = ()  # of queries, keys and values, where they are no tensors of their own

    @property
    def given(self) -> tuple[tuple[int, int, int, int], ...]:
        """The shapes of queries, keys and values."""
        n, heads = self.n, self.heads
        return (n, self.t, heads, self.d), (n, self.s, heads, self.d), (n, self.s, heads, self.dv)

    @property
    def places(self) -> tuple[View, ...]:
        """Where these lie."""
        return self.views or tuple(map(View.whole, self.given))

    @property
    def result(self) -> tuple[int, int, int, int]:
        return self.n, self.t, self.heads, self.dv

    @property
    def flops(self) -> int:
        return 2 * self.n * self.heads * self.t * self.s * (self.d + self.dv)


@dataclass(frozen=True)
class Tiling:
    """`bands` tasks a head, `block` queries at a time; and how many of these share a load of keys or values."""

    bands: int
    block: int
    score_rows: int
    mix_rows: int


def _default(shape: AttentionShape, isa: Isa, threads: int = 1) -> Tiling:
    needed = threads // math.gcd(threads, shape.n * shape.heads)
    bands = max(1, min(needed, shape.t // 8))  # all of them turn the keys for themselves
    pitch = round_up(shape.s, isa.lanes)
    block = at_a_time(shape.t, bands, queries_at_a_time(-(-shape.t // bands), pitch))
    score, mix = (tiles[0] for tiles in _tiles(shape, isa, block))
    return Tiling(bands, block, score.rows, mix.rows)


def _tilings(shape: AttentionShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = _default(shape, isa, threads)
        for block in (start.block, -(-start.block // 2), min(2 * start.block, shape.t // start.bands)):
            scores, mixes = _tiles(shape, isa, block)
            for score, mix in product(scores[:3], mixes[:3]):
                found[replace(start, block=block, score_rows=score.rows, mix_rows=mix.rows)] = None
    return list(found)


def _tiles(shape: AttentionShape, isa: Isa, block: int) -> tuple[list[microkernel.Tile], ...]:
    """Register tiles for a block of queries, best first, for scores and mixed values."""
    scores = microkernel.tiles(isa, block, round_up(shape.s, isa.lanes))
    return scores, microkernel.tiles(isa, block, round_up(shape.dv, isa.lanes))


class _Kernel:
    """A task takes a band of the queries of one head; it turns the keys and puts the values side by side first."""

    def __init__(self, shape: AttentionShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        self.block = at_a_time(shape.t, tiling.bands, tiling.block)
        self.lanes = min(isa.lanes, power_of_two(shape.dv))  # of values
        self.width = round_up(shape.dv, self.lanes)
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        return operands.constants(self.shape.epilogue, weights)

    def function(self) -> tirx.PrimFunc:
        shape, b, bands = self.shape, self.b, self.tiling.bands
        self.q, self.k, self.v = (
            (b.param(name, view.shape), view) for name, view in zip("qkv", shape.places, strict=True)
        )
        self.mask = b.param("mask", shape.mask) if shape.mask else None
        self.ending = Ending(b, shape.epilogue, shape.result)
        self.ending.declare_weights()
        self.out = b.param("out", shape.result), View.whole(shape.result)
        with b.loop("task", shape.n * shape.heads * bands, "parallel") as task:
            image = b.compute_once("image", task // (bands * shape.heads))
            head = b.compute_once("head", task // bands % shape.heads)
            first = b.compute_once("first", task % bands * shape.t // bands)
            last = b.compute_once("last", (task % bands + 1) * shape.t // bands)
            self._band(image, head, first, last)
        return b.function("attention")

    def _band(self, image: Expr, head: Expr, first: Expr, last: Expr) -> None:
        """Queries first .. last of a head."""
        shape, b, isa, block = self.shape, self.b, self.isa, self.block
        keys = Keys.of(b, isa, shape.s, shape.d)
        keys.clear(b, isa, -math.inf)
        keys.turn(b, isa, self._of_head(self.k, image, 0, head))
        values = self._values(self._of_head(self.v, image, 0, head))
        queries = Matrix(b.alloc("queries", block * shape.d), shape.d)
        scores = Matrix(b.alloc("scores", block * keys.pitch), keys.pitch)
        inverse = b.alloc("inverse", block + isa.lanes)
        mixed = b.alloc("mixed", block * self.width)

        def keep(row: Expr, column: Expr, value: Expr) -> None:
            b.store(mixed, row * self.width + column, value)

        with b.loop("block", (last - first + block - 1) // block) as index:
            query = b.compute_once("query", minimum(first + index * block, last - block))
            self._scaled(self._of_head(self.q, image, query, head), queries)
            score_keys(b, isa, self.tiling.score_rows, queries, 0, keys, scores.buffer, block)
            if self.mask is not None:
                self._masked(image, head, query, scores)
            powers_of_rows(b, isa, scores.buffer, keys.pitch, -(-shape.s // isa.lanes), inverse, block, strict=True)
            rows, vectors = self.tiling.mix_rows, self.width // self.lanes
            mix_values(b, isa, rows, scores, inverse, values, shape.s, self.lanes, vectors, block, keep)
            self._stored(mixed, self._of_head(self.out, image, query, head))

    def _stored(self, mixed: Buffer, target: Matrix) -> None:
        """The results of a block of queries, with their epilogue."""
        b = self.b
        with b.loop("row", self.block) as row:

            def finish(column: Expr, width: int) -> None:
                place = target.at(row, column)
                value = b.load(mixed, row * self.width + column, width)
                b.store(target.buffer, place, self.ending.done(value, Spot(place, column)))

            sweep(b, self.lanes, self.shape.dv, finish)

    def _of_head(self, lying: tuple[Buffer, View], image: Expr, first: Expr, head: Expr) -> Matrix:
        """What one head has of an image's tokens from `first` on."""
        buffer, view = lying
        base = view.offset + image * view.image + first * view.token + head * view.head
        return Matrix(buffer, view.token, self.b.compute_once("base", base))

    def _values(self, source: Matrix) -> Matrix:
        """Values side by side, in whole vectors; what is beyond their width is never looked at."""
        shape, b = self.shape, self.b
        values = Matrix(b.alloc("values", shape.s * self.width), self.width)
        with b.loop("row", shape.s) as row:
            copy(b, self.lanes, source.buffer, source.at(row, 0), values.buffer, values.at(row, 0), shape.dv)
        return values

    def _scaled(self, source: Matrix, queries: Matrix) -> None:
        """A block of queries, times the scale."""
        shape, b = self.shape, self.b
        with b.loop("row", self.block) as row:
            for column, width in microkernel.pieces(shape.d, self.isa.lanes):
                value = b.load(source.buffer, source.at(row, column), width)
                b.store(queries.buffer, queries.at(row, column), value * splat(shape.scale, width))

    def _masked(self, image: Expr, head: Expr, query: Expr, scores: Matrix) -> None:
        """Add the mask, along which extents of 1 are repeated."""
        shape, b = self.shape, self.b
        n, heads, t, s = (extent > 1 for extent in shape.mask)
        base = b.compute_once("mask_base", (image * n * shape.mask[1] + head * heads) * shape.mask[2] * shape.mask[3])
        with b.loop("row", self.block) as row:
            line = b.compute_once("line", base + (query + row) * t * shape.mask[3])
            for column, width in microkernel.pieces(shape.s, self.isa.lanes):
                more = b.load(self.mask, line + column, width) if s else splat(b.load(self.mask, line), width)
                total = b.load(scores.buffer, scores.at(row, column), width) + more
                b.store(scores.buffer, scores.at(row, column), total)


def _reference(shape: AttentionShape, arrays: Arrays) -> np.ndarray:
    given = zip("qkv", shape.places, shape.given, strict=True)
    query, key, value = (view.of(np.asarray(arrays[name], np.float64), own).swapaxes(1, 2) for name, view, own in given)
    scores = query @ key.swapaxes(2, 3) * shape.scale
    scores = scores + np.asarray(arrays["mask"], np.float64).reshape(shape.mask) if shape.mask else scores
    mixed = (softmax(scores) @ value).transpose(0, 2, 1, 3)
    return activations.reference(shape.epilogue.steps, mixed, dict(arrays))


class Attention(Generator):
    """softmax(scale * query key + mask) value, for every head."""

    OP = "attention"
    TILING = Tiling
    WIDE = True

    def problem(self, spec: KernelSpec) -> AttentionShape | None:
        own = len(spec.inputs) - len(spec.epilogue.operands)
        if own not in (3, 4) or len(spec.out.shape) != 4 or not operands.fit(spec, own):
            return None
        (n, t, heads, dv), (q, k, v) = spec.out.shape, (each.shape for each in spec.inputs[:3])
        if spec.get("views"):
            s, d = spec["keys"], spec["width"]
            views = tuple(View(shape, *places) for shape, places in zip((q, k, v), spec["views"], strict=True))
        elif len(k) == 4:
            (_, s, _, d), views = k, ()
        else:
            return None
        mask = spec.inputs[3].shape if own > 3 else ()
        mask = (1,) * (4 - len(mask)) + mask if mask else ()
        found = AttentionShape(n, t, s, heads, d, dv, spec["scale"], mask, spec.epilogue, views)
        inside = (view.last(own) < math.prod(view.shape) for view, own in zip(found.places, found.given, strict=True))
        fits = (
            operands.weighted(spec, {})
            and (all(inside) if views else (q, k, v) == found.given)
            and all(extent in (1, all_) for extent, all_ in zip(mask, (n, heads, t, s), strict=False))
        )
        return found if fits else None

    def bytes(self, spec: KernelSpec) -> int:
        """Of what is viewed, the part that is read."""
        shape = self.problem(spec)
        assert shape is not None, f"attention makes no loops for {spec.text}"
        read = [replace(each, shape=own) for each, own in zip(spec.inputs, shape.given, strict=False)]
        return super().bytes(replace(spec, inputs=(*read, *spec.inputs[3:])))

    def default_for(self, problem: AttentionShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: AttentionShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: AttentionShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: AttentionShape, arrays: Arrays) -> np.ndarray:
        return _reference(problem, arrays)
