"""SAA as one kernel: layer norm, one token a window, attention among the tokens, deconvolution, residual.

* aggregate: row by row, positions are normalised into a ring of rows, their saliency is taken from there, and when a
  row of windows is complete, their softmax and their tokens. Only the ring, in the cache, ever holds the normal map.
* attend: one head after another, so that its query, key and value stay in the first-level cache.
* recover: projection, then every token spreads over its window and is added to the input.

What can be folded into weights is: the affine terms of the layer norm into qkv and saliency (whose share of the bias
differs at the edges of the image: hence a map), and scale and log2(e) into the query, so that a softmax is one of
powers of two.

The two large products compute in the type of the model, everything between them in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from tvm import tirx

from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, lanes_of, minimum, round_up, splat
from schedules.cpu.epilogue import applied
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.lanes import across, exp2
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives import operands
from schedules.cpu.primitives.attention import Keys, Matrix, mix_values, queries_at_a_time, score_keys
from schedules.cpu.primitives.norm import normalised_rows
from schedules.cpu.primitives.softmax import powers_of_rows, softmax
from schedules.cpu.primitives.unrolling import even, every
from schedules.machines.cpus import Isa
from schedules.saa_shape import NO_SHARE, TAPS, SAAShape
from schedules.spec import Epilogue, KernelSpec

RESIDUAL = Epilogue(("bias", "add x"))
UNROLLED = 8  # vectors of channels that are written out


@dataclass(frozen=True)
class Tiling:
    """Register tiles of the matrix products; and for attention, how many queries share a load of keys or values."""

    qkv_rows: int
    qkv_vectors: int
    score_rows: int
    mix_rows: int
    project_rows: int
    project_vectors: int
    unroll: int


def _default(shape: SAAShape, isa: Isa, threads: int = 1) -> Tiling:
    qkv, project, score, mix = (tiles[0] for tiles in _tiles(shape, isa, threads))
    return Tiling(qkv.rows, qkv.vectors, score.rows, mix.rows, project.rows, project.vectors, unroll=4)


def _tilings(shape: SAAShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        qkvs, projects, scores, mixes = _tiles(shape, isa, threads)
        for qkv, project, score, mix in product(qkvs[:3], projects[:3], scores[:2], mixes[:2]):
            tiling = Tiling(qkv.rows, qkv.vectors, score.rows, mix.rows, project.rows, project.vectors, unroll=4)
            found[tiling] = None
    return list(found)


def _tiles(shape: SAAShape, isa: Isa, threads: int) -> tuple[list[Tile], ...]:
    """Register tiles, best first, for qkv, projection, scores and mixed values."""
    wide = isa.wide()
    head = -(-3 * shape.dim // isa.lanes)
    qkv = microkernel.tiles(isa, shape.tokens, 3 * shape.dim)
    return (
        [tile for tile in qkv if head % tile.vectors == 0],  # a head's panels are filled up
        microkernel.tiles(isa, _projected_at_least(shape, threads), shape.c),
        microkernel.tiles(wide, shape.tokens, round_up(shape.tokens, wide.lanes)),
        microkernel.tiles(wide, shape.tokens, shape.dim),
    )


def _groups(shape: SAAShape, threads: int) -> int:
    """How many tasks share an image, so that all threads have as much to do."""
    return threads // math.gcd(shape.n, threads)


def _projected_at_least(shape: SAAShape, threads: int) -> int:
    """The fewest tokens that a task projects: without windows to write, tasks share the columns instead."""
    return shape.tokens if shape.r == 1 else max(1, shape.tokens // _groups(shape, threads))


class _Kernel:
    def __init__(self, shape: SAAShape, products: Isa, tiling: Tiling, threads: int) -> None:
        self.shape, self.products, self.tiling, self.threads = shape, products, tiling, threads
        self.isa = isa = products.wide()
        self.groups = _groups(shape, threads)
        self.vector = math.gcd(shape.c, isa.lanes)  # lanes where channels are the lanes
        self.vectors = shape.c // self.vector
        self.qkv = Tile(min(tiling.qkv_rows, shape.tokens), tiling.qkv_vectors, tiling.unroll)
        rows = min(tiling.project_rows, _projected_at_least(shape, threads))
        self.project = Tile(rows, tiling.project_vectors, tiling.unroll)
        self.head_panels = microkernel.panels(3 * shape.dim, self.qkv, products)
        self.head_width = self.head_panels * self.qkv.vectors * products.lanes
        self.line = (shape.columns * shape.r + 2) * shape.c  # a row of the ring: a position more at both ends
        self.pitch = round_up(shape.columns * shape.r, isa.lanes) + isa.lanes  # a row of saliencies
        self.b = Builder(isa.dtype, isa.stored)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        wide = {name: weight.astype(np.float64) for name, weight in weights.items()}
        packed = [*self._packed_qkv(wide), microkernel.pack(weights["pr_w"], self.project, self.products), wide["pr_b"]]
        if self.shape.r > 1:
            packed = [*self._packed_saliency(wide), *packed, wide["up_w"], wide["up_b"]]
        return [np.ascontiguousarray(weight) for weight in packed]

    def _packed_qkv(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Columns by head, each its query, key and value; layer norm's affine terms and the scale folded in."""
        shape = self.shape
        matrix = weights["ln_g"][:, None] * weights["qkv_w"]
        bias = weights["ln_b"] @ weights["qkv_w"] + weights["qkv_b"]
        both = np.concatenate([matrix, bias[None]]).reshape(shape.c + 1, 3, shape.heads, shape.dim)
        both[:, 0] *= shape.scale * math.log2(math.e)
        by_head = np.zeros((shape.c + 1, shape.heads, self.head_width))
        by_head[:, :, : 3 * shape.dim] = both.transpose(0, 2, 1, 3).reshape(shape.c + 1, shape.heads, -1)
        flat = by_head.reshape(shape.c + 1, -1)
        return [microkernel.pack(flat[:-1], self.qkv, self.products), flat[-1]]

    def _packed_saliency(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Taps over the normalised map, and what the biases add at each position."""
        shape = self.shape
        taps = weights["ln_g"] * weights["sal_w"] * math.log2(math.e)
        blocks = taps.reshape(TAPS, self.vectors, self.vector).transpose(1, 0, 2)
        biases = weights["sal_w"] @ weights["ln_b"]
        inside = np.pad(np.ones((shape.h, shape.w)), 1)
        added = sum(biases[i, j] * inside[i : i + shape.h, j : j + shape.w] for i in range(3) for j in range(3))
        biased = np.full((shape.rows * shape.r, self.pitch), NO_SHARE)
        biased[: shape.h, : shape.w] = (added + _by_position(weights["sal_b"], shape)) * math.log2(math.e)
        return [blocks, biased]

    def function(self) -> tirx.PrimFunc:
        shape, b, isa = self.shape, self.b, self.products
        image = (shape.n, shape.h, shape.w, shape.c)
        self.x = b.param("x", image)
        if shape.r > 1:
            self.taps = b.param("taps", (self.vectors, TAPS, self.vector))
            # In float32 in any case: NO_SHARE is beyond what a smaller type can hold.
            self.biased = b.param("biased", (shape.rows * shape.r, self.pitch), "float32")
        width = self.qkv.vectors * isa.lanes
        self.qkv_w = b.param("qkv_w", (shape.heads * self.head_panels, shape.c, width))
        self.qkv_b = b.param("qkv_b", (shape.heads * self.head_width,))
        panels = microkernel.panels(shape.c, self.project, isa)
        self.project_w = b.param("project_w", (panels, shape.c, self.project.vectors * isa.lanes))
        self.project_b = b.param("project_b", (shape.c,))
        if shape.r > 1:
            self.up_w = b.param("up_w", (shape.r, shape.r, shape.c))
            self.up_b = b.param("up_b", (shape.c,))
        self.out = b.param("out", image)
        if self.groups == 1:
            self._by_image()
        else:
            self._by_phase()
        return b.function("saa")

    def _by_image(self) -> None:
        """Every task does whole images, which share nothing."""
        shape, b = self.shape, self.b
        with b.loop("image", shape.n, "parallel" if self.threads > 1 else "serial") as image:
            tokens = self._operand("tokens", shape.tokens * shape.c)
            mixed = self._operand("mixed", shape.tokens * shape.c)
            if shape.r > 1:
                self._aggregate(image, 0, shape.rows, tokens, 0)
            else:
                self._normalised(image * shape.tokens, shape.tokens, tokens, 0)
            self._attend(tokens, 0, mixed, 0, 0, shape.heads)
            if shape.r > 1:
                self._recover(image, mixed, 0, 0, shape.tokens)
            else:
                self._project(mixed, 0, shape.tokens, self._add_input(image), None)

    def _by_phase(self) -> None:
        """Several tasks for an image: rows of windows, then heads, then tokens (or columns of the result)."""
        shape = self.shape
        size = shape.tokens * shape.c
        mixed = self._operand("mixed", shape.n * size)
        if shape.r > 1:
            tokens = self._operand("tokens", shape.n * size)
            with self._tasks(shape.rows) as (image, first, last):
                self._aggregate(image, first, last, tokens, image * size)
        with self._tasks(shape.heads) as (image, first, last):
            if shape.r > 1:
                self._attend(tokens, image * size, mixed, image * size, first, last - first)
            else:
                # Every task normalises all tokens for itself: that costs less than to wait for others.
                tokens = self._operand("tokens", size)
                self._normalised(image * shape.tokens, shape.tokens, tokens, 0)
                self._attend(tokens, 0, mixed, image * size, first, last - first)
        if shape.r > 1:
            with self._tasks(shape.tokens) as (image, first, last):
                self._recover(image, mixed, image * size, first, last)
        else:
            with self._tasks(microkernel.panels(shape.c, self.project, self.products)) as (image, first, last):
                finish = self._add_input(image)
                self._project(mixed, image * size, shape.tokens, finish, (first, last - first))

    def _operand(self, name: str, size: int) -> Buffer:
        """Scratch memory for the left side of a product."""
        return self.b.alloc(name, size, dtype=self.products.dtype)

    def _tasks(self, count: int) -> _Tasks:
        return _Tasks(self.b, self.shape.n, min(self.groups, count), count)

    def _aggregate(self, image: Expr, first: Expr, last: Expr, tokens: Buffer, at: Expr) -> None:
        """The tokens of window rows first .. last."""
        shape, b = self.shape, self.b
        ring = _Ring(b.alloc("ring", (shape.r + 2) * self.line), shape.r + 2, self.line)
        share = b.alloc("share", shape.r * self.pitch)
        whole = b.alloc("whole", self.pitch)
        self._clear_margins(ring)
        with b.loop("step", (last - first) * shape.r + 2) as step:
            place = b.bind("place", first * shape.r + step - 1)
            self._ring_row(ring, image, place)
            with b.when(step >= 2):  # a row of saliencies takes three of the ring
                self._saliency(ring, place - 1, share, (place - 1) % shape.r)
                with b.when(place % shape.r == 0):
                    row = b.bind("row", place // shape.r - 1)
                    self._softmax_of_windows(share, whole)
                    with b.loop("column", shape.columns) as column:
                        token = b.bind("token", at + (row * shape.columns + column) * shape.c)
                        self._token(ring, row, column, share, whole, tokens, token)

    def _clear_margins(self, ring: _Ring) -> None:
        """Zeros left and right of the image, which the rows leave alone."""
        shape, b = self.shape, self.b
        after = (shape.columns * shape.r - shape.w + 1) * self.vectors
        with b.loop("row", ring.rows) as row:
            for start, count in ((0, self.vectors), ((shape.w + 1) * shape.c, after)):
                with b.loop("i", count) as i:
                    place = row * ring.line + start + i * self.vector
                    b.store(ring.buffer, place, splat(0.0, self.vector))

    def _ring_row(self, ring: _Ring, image: Expr, y: Expr) -> None:
        """Row y of the image, normalised; zeros above and below the image."""
        shape, b = self.shape, self.b
        slot = b.bind("slot", ring.start(y))
        inside = tirx.all(y >= 0, y < shape.h)
        with b.when(inside):
            self._normalised((image * shape.h + y) * shape.w, shape.w, ring.buffer, slot + shape.c)
        with b.when(tirx.Not(inside)), b.loop("i", shape.w * self.vectors) as i:
            b.store(ring.buffer, slot + shape.c + i * self.vector, splat(0.0, self.vector))

    def _normalised(self, position: Expr, count: int, target: Buffer, at: Expr) -> None:
        """`count` positions of the input, normalised over their channels."""
        shape, b = self.shape, self.b

        def start(row: Expr) -> Expr:
            return (position + row) * shape.c

        def keep(row: Expr, channel: int, value: Expr) -> None:
            b.store(target, at + row * shape.c + channel, value)

        normalised_rows(b, self.x, start, count, shape.c, self.vector, shape.eps, keep, self.vectors)

    def _saliency(self, ring: _Ring, place: Expr, share: Buffer, y: Expr) -> None:
        """A row of the 3x3 convolution to one channel."""
        shape, b, vector = self.shape, self.b, self.vector
        width = shape.columns * shape.r
        strip = even(width, min(8, max(vector, 1)))
        above = [b.bind(f"above{ky}", ring.start(place + ky - 1)) for ky in range(3)]
        with b.loop("strip", -(-width // strip)) as index:
            x = b.bind("x", minimum(index * strip, width - strip))
            sums = [b.cell(f"sum{i}", vector) for i in range(strip)]
            for total in sums:
                b.store(total, 0, splat(0.0, vector))
            with b.loop("channel", self.vectors) as k:
                for ky in range(3):
                    tap = [
                        b.bind("tap", b.load(self.taps, (k * TAPS + 3 * ky + kx) * vector, vector)) for kx in range(3)
                    ]
                    for i in range(strip + 2):
                        value = b.bind("value", b.load(ring.buffer, above[ky] + (x + i) * shape.c + k * vector, vector))
                        for kx in range(3):
                            if 0 <= i - kx < strip:
                                total = sums[i - kx]
                                b.store(total, 0, b.load(total, 0, vector) + value * tap[kx])
            row = across(b, [b.load(total, 0, vector) for total in sums], lambda a, c: a + c)
            bias = b.load(self.biased, place * self.pitch + x, lanes_of(row))
            b.store(share, y * self.pitch + x, row + bias)

    def _softmax_of_windows(self, share: Buffer, whole: Buffer) -> None:
        """Powers of two in `share`, and one over their sum in `whole`, at the first position of each window."""
        shape, b, lanes = self.shape, self.b, self.isa.lanes
        blocks = round_up(shape.columns * shape.r, lanes) // lanes

        def by_window(combine: Callable[[Expr, Expr], Expr], finish: Callable[[Expr], Expr]) -> None:
            with b.loop("window", shape.columns) as window:
                start = b.bind("start", window * shape.r)
                values = [b.load(whole, start + i) for i in range(shape.r)]
                result = values[0]
                for value in values[1:]:
                    result = combine(result, value)
                result = b.bind("result", finish(result))
                for i, width in microkernel.pieces(shape.r, lanes):
                    b.store(whole, start + i, splat(result, width))

        with b.loop("block", blocks) as block:
            top = b.load(share, block * lanes, lanes)
            for y in range(1, shape.r):
                top = b.bind("top", tirx.max(top, b.load(share, y * self.pitch + block * lanes, lanes)))
            b.store(whole, block * lanes, top)
        by_window(tirx.max, lambda top: top)
        with b.loop("block", blocks) as block:
            top = b.bind("top", b.load(whole, block * lanes, lanes))
            total: Expr = splat(0.0, lanes)
            for y in range(shape.r):
                power = exp2(b, b.load(share, y * self.pitch + block * lanes, lanes) - top)
                b.store(share, y * self.pitch + block * lanes, power)
                total = b.bind("total", total + power)
            b.store(whole, block * lanes, total)
        by_window(lambda a, c: a + c, lambda total: tirx.const(1.0, "float32") / total)

    def _token(
        self, ring: _Ring, row: Expr, column: Expr, share: Buffer, whole: Buffer, tokens: Buffer, token: Expr
    ) -> None:
        """The sum of a window's positions, weighted by their shares."""
        shape, b, vector = self.shape, self.b, self.vector
        chunk = even(self.vectors, UNROLLED)
        left = b.bind("left", column * shape.r)
        with b.loop("chunk", -(-self.vectors // chunk)) as index:
            channel = b.bind("channel", minimum(index * chunk, self.vectors - chunk) * vector)
            sums = [b.cell(f"sum{k}", vector) for k in range(chunk)]
            for total in sums:
                b.store(total, 0, splat(0.0, vector))

            def add_row(y: Expr) -> None:
                start = b.bind("start", ring.start(row * shape.r + y) + (left + 1) * shape.c + channel)
                for x in range(shape.r):
                    weight = b.bind("weight", splat(b.load(share, y * self.pitch + left + x), vector))
                    for k, total in enumerate(sums):
                        value = b.load(ring.buffer, start + x * shape.c + k * vector, vector)
                        b.store(total, 0, b.load(total, 0, vector) + weight * value)

            every(b, "y", shape.r if shape.r <= 4 else 0, shape.r, add_row)
            norm = b.bind("norm", splat(b.load(whole, left), vector))
            for k, total in enumerate(sums):
                b.store(tokens, token + channel + k * vector, b.load(total, 0, vector) * norm)

    def _attend(self, tokens: Buffer, at: Expr, mixed: Buffer, to: Expr, first: Expr, heads: Expr) -> None:
        """Heads first .. first + heads: mixed = softmax(query key) value."""
        shape, b, isa = self.shape, self.b, self.isa
        count = shape.tokens
        qkv = b.alloc("qkv", count * self.head_width)
        keys = Keys.of(b, isa, count, shape.dim)
        block = queries_at_a_time(count, keys.pitch)
        scores = Matrix(b.alloc("scores", block * keys.pitch), keys.pitch)
        inverse = b.alloc("inverse", block + isa.lanes)
        keys.clear(b, isa, NO_SHARE)
        a = Rows(tokens, lambda row: at + row * shape.c, ((shape.c, 1),))
        queries, key, value = (Matrix(qkv, self.head_width, i * shape.dim) for i in range(3))
        with b.loop("head", heads) as index:
            head = b.bind("head", first + index)

            def keep(row: Expr, column: Expr, value: Expr) -> None:
                bias = b.load(self.qkv_b, column, lanes_of(value))
                b.store(qkv, row * self.head_width + column - head * self.head_width, value + bias)

            some = (head * self.head_panels, self.head_panels)
            columns = shape.heads * self.head_width
            microkernel.gemm(b, self.products, self.qkv, a, self.qkv_w, count, columns, keep, some)
            keys.turn(b, isa, key)
            with b.loop("block", -(-count // block)) as part:
                query = b.bind("query", minimum(part * block, count - block))
                score_keys(b, isa, self.tiling.score_rows, queries, query, keys, scores.buffer, block)
                powers_of_rows(b, isa, scores.buffer, keys.pitch, -(-count // isa.lanes), inverse, block)
                self._mix(scores, inverse, value, mixed, to + query * shape.c + head * shape.dim, block)

    def _mix(self, scores: Matrix, inverse: Buffer, values: Matrix, mixed: Buffer, to: Expr, count: int) -> None:
        """The values of all tokens, weighted by the scores of `count` queries."""
        shape, b = self.shape, self.b
        lanes = math.gcd(shape.dim, self.isa.lanes)

        def keep(row: Expr, column: Expr, value: Expr) -> None:
            b.store(mixed, to + row * shape.c + column, value)

        rows, vectors = self.tiling.mix_rows, shape.dim // lanes
        mix_values(b, self.isa, rows, scores, inverse, values, shape.tokens, lanes, vectors, count, keep)

    def _project(
        self,
        mixed: Buffer,
        at: Expr,
        rows: Expr,
        finish: microkernel.Finish,
        some: tuple[Expr, Expr] | None,
    ) -> None:
        shape = self.shape
        a = Rows(mixed, lambda row: at + row * shape.c, ((shape.c, 1),))
        microkernel.gemm(self.b, self.products, self.project, a, self.project_w, rows, shape.c, finish, some)

    def _add_input(self, image: Expr) -> microkernel.Finish:
        """At rate 1 a token is a position: out = x + token."""
        shape, b = self.shape, self.b

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            place = b.bind("place", (image * shape.tokens + row) * shape.c + column)
            operand = operands.at(b, {"x": self.x}, place, self.project_b, column)
            b.store(self.out, place, applied(b, RESIDUAL, value, operand))

        return finish

    def _recover(self, image: Expr, mixed: Buffer, at: Expr, first: Expr, last: Expr) -> None:
        """Project tokens first .. last and spread each over its window: out = x + token * up_w + up_b."""
        shape, b = self.shape, self.b
        most = -(-shape.tokens // self.groups)
        spread = b.alloc("spread", most * shape.c)

        def keep(row: Expr, column: Expr, value: Expr) -> None:
            b.store(spread, row * shape.c + column, value + b.load(self.project_b, column, lanes_of(value)))

        self._project(mixed, at + first * shape.c, last - first, keep, None)
        with b.loop("token", last - first) as index:
            token = b.bind("token", first + index)
            self._window(
                image, b.bind("row", token // shape.columns), b.bind("column", token % shape.columns), spread, index
            )

    def _window(self, image: Expr, row: Expr, column: Expr, spread: Buffer, index: Expr) -> None:
        shape, b, vector, r = self.shape, self.b, self.vector, self.shape.r
        high = r if shape.h % r == 0 else b.bind("high", minimum(r, shape.h - row * r))
        wide = r if shape.w % r == 0 else b.bind("wide", minimum(r, shape.w - column * r))
        corner = b.bind("corner", ((image * shape.h + row * r) * shape.w + column * r) * shape.c)
        chunk = even(self.vectors, 6)
        with b.loop("chunk", -(-self.vectors // chunk)) as part:
            channel = b.bind("channel", minimum(part * chunk, self.vectors - chunk) * vector)
            token = [
                b.bind("token", b.load(spread, index * shape.c + channel + k * vector, vector)) for k in range(chunk)
            ]
            bias = [b.bind("bias", b.load(self.up_b, channel + k * vector, vector)) for k in range(chunk)]
            with b.loop("y", high) as y, b.loop("x", wide) as x:
                place = b.bind("place", corner + (y * shape.w + x) * shape.c + channel)
                tap = b.bind("tap", (y * r + x) * shape.c + channel)
                for k in range(chunk):
                    value = b.load(self.x, place + k * vector, vector) + bias[k]
                    weight = b.load(self.up_w, tap + k * vector, vector)
                    b.store(self.out, place + k * vector, value + token[k] * weight)


@dataclass(frozen=True)
class _Ring:
    """The last few rows of an image: row y lives where y + 1 modulo `rows` says."""

    buffer: Buffer
    rows: int
    line: int

    def start(self, y: Expr) -> Expr:
        return (y + 1) % self.rows * self.line


class _Tasks:
    """A parallel loop over `parts` even parts of 0 .. count of every image."""

    def __init__(self, b: Builder, images: int, parts: int, count: int) -> None:
        self.b, self.images, self.parts, self.count = b, images, parts, count
        self.loop = b.loop("task", images * parts, "parallel")

    def __enter__(self) -> tuple[Expr, Expr, Expr]:
        b, task = self.b, self.loop.__enter__()
        part = b.bind("part", task % self.parts)
        first = b.bind("first", part * self.count // self.parts)
        last = b.bind("last", (part + 1) * self.count // self.parts)
        return b.bind("image", task // self.parts), first, last

    def __exit__(self, *failure: object) -> None:
        self.loop.__exit__(*failure)  # type: ignore[arg-type]


def _by_position(bias: np.ndarray, shape: SAAShape) -> np.ndarray:
    """The saliency's bias of every position: one number, or one for each position of a window."""
    window = np.broadcast_to(bias, (shape.r, shape.r))
    return np.tile(window, (shape.rows, shape.columns))[: shape.h, : shape.w]


def _reference(x: np.ndarray, weights: Arrays, shape: SAAShape) -> np.ndarray:
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + shape.eps) * weights["ln_g"] + weights["ln_b"]
    tokens = _aggregated(y, weights, shape) if shape.r > 1 else y.reshape(shape.n, -1, shape.c)
    qkv = (tokens @ weights["qkv_w"] + weights["qkv_b"]).reshape(shape.n, shape.tokens, 3, shape.heads, shape.dim)
    query, key, value = qkv.transpose(2, 0, 3, 1, 4)
    mixed = softmax(query @ key.swapaxes(2, 3) * shape.scale) @ value
    tokens = mixed.transpose(0, 2, 1, 3).reshape(shape.n, shape.tokens, shape.c) @ weights["pr_w"] + weights["pr_b"]
    tokens = tokens.reshape(shape.n, shape.rows, shape.columns, shape.c)
    if shape.r == 1:
        return x + tokens
    windows = tokens[:, :, None, :, None] * weights["up_w"][:, None] + weights["up_b"]
    spread = windows.reshape(shape.n, shape.rows * shape.r, shape.columns * shape.r, shape.c)
    return x + spread[:, : shape.h, : shape.w]


def _aggregated(y: np.ndarray, weights: Arrays, shape: SAAShape) -> np.ndarray:
    """A token a window; positions beyond the image have no share."""
    around = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    saliency = sum(around[:, i : i + shape.h, j : j + shape.w] @ weights["sal_w"][i, j] for i, j in taps)
    below, right = shape.rows * shape.r - shape.h, shape.columns * shape.r - shape.w
    saliency = saliency + _by_position(weights["sal_b"], shape)
    saliency = np.pad(saliency, ((0, 0), (0, below), (0, right)), constant_values=-np.inf)
    y = np.pad(y, ((0, 0), (0, below), (0, right), (0, 0)))

    def windows(values: np.ndarray) -> np.ndarray:
        split = values.reshape(shape.n, shape.rows, shape.r, shape.columns, shape.r, -1)
        return split.transpose(0, 1, 3, 2, 4, 5).reshape(shape.n, shape.tokens, shape.r**2, -1)

    return (softmax(windows(saliency)[..., 0])[..., None] * windows(y)).sum(2)


class SAA(Generator):
    OP = "saa"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> SAAShape | None:
        n, h, w, c = spec.x.axes("NHWC")
        shape = SAAShape(n, h, w, c, spec["heads"], spec["r"], spec["eps"], spec["scale"])
        return shape if c % shape.heads == 0 else None

    def default_for(self, problem: SAAShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: SAAShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: SAAShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling, threads)

    def reference_for(self, problem: SAAShape, arrays: Arrays) -> np.ndarray:
        return _reference(arrays["x"], arrays, problem)
