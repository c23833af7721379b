"""A sweep over the windows of images, channel by channel: what a depthwise convolution and pooling share.

Results are made in strips: a few neighbouring columns of one vector of channels, each of which accumulates in a
register, so that what is loaded serves all windows that see it. There is no padded copy: rows beyond the image are
left out of the loop over a window's rows, and strips at the left and right edge leave out the columns that are not
there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
from tvm import tirx

from schedules.cpu.builder import Buffer, Builder, Expr, integer, maximum, minimum
from schedules.cpu.primitives.operands import Spot
from schedules.machines.cpus import Isa

CHUNK = 1 << 15  # numbers of the input that are swept for all channels: few enough to be there for the next ones
WRITTEN_OUT = 256  # steps of a strip that are written out; of larger kernels, the rows of a window are a loop

# step(column of the window, total, value): the total with one more value.
Step = Callable[[int, Expr, Expr], Expr]


@dataclass(frozen=True)
class Windows:
    n: int
    h: int
    w: int
    c: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # above, left, below, right
    dilation: tuple[int, int] = (1, 1)

    @property
    def image(self) -> tuple[int, ...]:
        return self.n, self.h, self.w, self.c

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of the input that a result sees, with those that dilation leaves out."""
        (high, wide), (down, across) = self.kernel, self.dilation
        return (high - 1) * down + 1, (wide - 1) * across + 1

    @property
    def out_h(self) -> int:
        return (self.h + self.padding[0] + self.padding[2] - self.span[0]) // self.strides[0] + 1

    @property
    def out_w(self) -> int:
        return (self.w + self.padding[1] + self.padding[3] - self.span[1]) // self.strides[1] + 1

    @property
    def out_c(self) -> int:
        return self.c

    @property
    def result(self) -> tuple[int, ...]:
        return self.n, self.out_h, self.out_w, self.out_c

    @property
    def flops(self) -> int:
        return 2 * self.n * self.out_h * self.out_w * self.c * math.prod(self.kernel)

    def present(self, x: int, column: int) -> bool:
        """Whether a column, seen from the window of result x, is in the image."""
        return 0 <= x * self.strides[1] - self.padding[1] + column < self.w


def taps(shape: Windows, x: np.ndarray, beyond: float = 0.0) -> Iterator[tuple[int, int, np.ndarray]]:
    """For every place (i, j) of a window, what all results see there, in numpy; `beyond` is around the image."""
    above, left, below, right = shape.padding
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (above, below), (left, right), (0, 0)), constant_values=beyond)
    (high, wide), (down, across) = shape.strides, shape.dilation
    for i, j in product(*map(range, shape.kernel)):
        rows = slice(i * down, i * down + high * (shape.out_h - 1) + 1, high)
        columns = slice(j * across, j * across + wide * (shape.out_w - 1) + 1, wide)
        yield i, j, padded[:, rows, columns]


@dataclass(frozen=True)
class Tiling:
    """`bands` x `groups` tasks an image (rows x channels), `chunk` rows at a time, `strip` columns of results."""

    bands: int
    groups: int
    chunk: int
    strip: int


def lanes_for(channels: int, isa: Isa) -> int:
    """A vector is never wider than all channels; where they do not fill the last one, it is moved back."""
    return min(isa.lanes, 1 << (channels.bit_length() - 1))


def default(shape: Windows, isa: Isa, threads: int = 1) -> Tiling:
    needed = threads // math.gcd(threads, shape.n)
    vectors = -(-shape.c // lanes_for(shape.c, isa))
    groups = 1 if shape.out_h >= 4 * needed else min(needed, vectors)
    bands = min(shape.out_h, -(-needed // groups))
    chunk = max(1, min(-(-shape.out_h // bands), CHUNK // (shape.strides[0] * shape.w * shape.c)))
    return Tiling(bands, groups, chunk, _strips(shape, isa)[0])


def tilings(shape: Windows, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = default(shape, isa, threads)
        for chunk, strip in product((start.chunk, -(-start.chunk // 4)), _strips(shape, isa)):
            found[replace(start, chunk=chunk, strip=strip)] = None
    return list(found)


def _strips(shape: Windows, isa: Isa) -> list[int]:
    """Widths of strips, best first: accumulators, the factors of a row and a value have to fit the registers."""
    most = max(1, min(shape.out_w, isa.registers - shape.kernel[1] - 2, 14))
    return sorted(range(1, most + 1), key=lambda size: (-(-shape.out_w // size) * (size + 2), size))[:4]


class Sweep(ABC):
    """The loops; what is done with the values is a matter of the three methods of a kernel."""

    def __init__(self, b: Builder, isa: Isa, shape: Windows, tiling: Tiling) -> None:
        self.b, self.isa, self.shape, self.tiling = b, isa, shape, tiling
        self.lanes = lanes_for(shape.c, isa)
        self.vectors = -(-shape.c // self.lanes)

    @abstractmethod
    def start(self, vector: Expr) -> Expr:
        """What a sum of a vector of channels starts with."""

    @abstractmethod
    def row(self, vector: Expr, ky: Expr) -> Step:
        """How the values of row `ky` of a window count."""

    @abstractmethod
    def finish(self, spot: Spot, vector: Expr, total: Expr, rows: Expr, columns: int) -> None:
        """The end of a result, whose window had so many rows and columns in the image."""

    def starts(self) -> list[int]:
        """The first channel of every vector."""
        return [min(vector * self.lanes, self.shape.c - self.lanes) for vector in range(self.vectors)]

    def loops(self, x: Buffer) -> None:
        shape, b, tiling = self.shape, self.b, self.tiling
        with b.loop("task", shape.n * tiling.bands * tiling.groups, "parallel") as task:
            group = b.compute_once("group", task % tiling.groups)
            band = b.compute_once("band", task // tiling.groups % tiling.bands)
            image = b.compute_once("image", task // (tiling.groups * tiling.bands))
            first = b.compute_once("first", band * shape.out_h // tiling.bands)
            last = b.compute_once("last", (band + 1) * shape.out_h // tiling.bands)
            begin = b.compute_once("begin", group * self.vectors // tiling.groups)
            end = b.compute_once("end", (group + 1) * self.vectors // tiling.groups)
            with b.loop("chunk", (last - first + tiling.chunk - 1) // tiling.chunk) as index:
                low = b.compute_once("low", first + index * tiling.chunk)
                count = b.compute_once("count", minimum(tiling.chunk, last - low))
                with b.loop("vector", end - begin) as at, b.loop("y", count) as y:
                    self._row_of_results(x, image, b.compute_once("row", low + y), begin + at)

    def _row_of_results(self, x: Buffer, image: Expr, y: Expr, vector: Expr) -> None:
        shape, b, (high, _) = self.shape, self.b, self.shape.kernel
        down = shape.dilation[0]
        channel = vector * self.lanes
        if shape.c % self.lanes:
            channel = minimum(channel, shape.c - self.lanes)
        channel = b.compute_once("channel", channel)
        top = b.compute_once("top", y * shape.strides[0] - shape.padding[0])
        source = b.compute_once("source", (image * shape.h + top) * shape.w * shape.c + channel)
        target = b.compute_once("target", (image * shape.out_h + y) * shape.out_w * shape.out_c + channel)
        # The rows of the windows that are in the image.
        begin = b.compute_once("ky_begin", maximum(0, (down - 1 - top) // down))
        end = b.compute_once("ky_end", minimum(high, (shape.h - top + down - 1) // down))
        strip = _Strip(self, x, vector, source, Spot(target, channel, image))
        if math.prod(shape.kernel) * self.tiling.strip > WRITTEN_OUT:
            strip.row(begin, end)
            return
        whole = tirx.all(integer(begin) == 0, integer(end) == high)
        with b.when(whole):
            strip.row(0, high)
        if any(shape.padding[::2]):
            with b.when(tirx.Not(whole)):
                strip.row(begin, end)


@dataclass(frozen=True)
class _Strip:
    """Strips of one row of results for one vector of channels."""

    sweep: Sweep
    x: Buffer
    vector: Expr
    source: Expr
    target: Spot

    def row(self, begin: Expr, end: Expr) -> None:
        """All strips of a row; those of which all windows are within the image's columns are one loop."""
        shape, b, size = self.sweep.shape, self.sweep.b, self.sweep.tiling.strip
        inner = [i for i in range(shape.out_w // size) if self._within(i * size, size)]
        low, high = (inner[0], inner[-1] + 1) if inner else (0, 0)
        for x in (*range(0, low * size, size), *range(high * size, shape.out_w, size)):
            self._strip(x, min(size, shape.out_w - x), begin, end, partial(shape.present, x))
        if inner:
            with b.loop("strip", high - low) as index:
                self._strip(b.compute_once("x", (low + index) * size), size, begin, end, lambda column: True)

    def _within(self, x: int, size: int) -> bool:
        return self.sweep.shape.present(x, 0) and self.sweep.shape.present(x, self._span(size) - 1)

    def _span(self, size: int) -> int:
        """How many columns the windows of neighbouring results see."""
        shape = self.sweep.shape
        return (size - 1) * shape.strides[1] + (shape.kernel[1] - 1) * shape.dilation[1] + 1

    def _strip(self, x: Expr, size: int, begin: Expr, end: Expr, present: Callable[[int], bool]) -> None:
        sweep, shape, b = self.sweep, self.sweep.shape, self.sweep.b
        lanes = sweep.lanes
        place = b.compute_once("place", self.source + (x * shape.strides[1] - shape.padding[1]) * shape.c)
        sums = [b.cell(f"sum{i}", lanes) for i in range(size)]
        first = b.bind("first", sweep.start(self.vector))
        for total in sums:
            b.store(total, 0, first)

        def add(ky: Expr) -> None:
            step = sweep.row(self.vector, ky)
            line = b.compute_once("line", place + ky * (shape.dilation[0] * shape.w * shape.c))
            for column in filter(present, range(self._span(size))):
                value = None
                for i, kx in self._windows(column, size):
                    if value is None:
                        value = b.bind("value", b.load(self.x, line + column * shape.c, lanes))
                    b.store(sums[i], 0, step(kx, b.load(sums[i], 0, lanes), value))

        if isinstance(begin, int) and isinstance(end, int):
            for ky in range(begin, end):
                add(ky)
        else:
            with b.loop("ky", end - begin) as index:
                add(b.compute_once("ky", begin + index))
        for i, total in enumerate(sums):
            columns = sum(present(i * shape.strides[1] + kx * shape.dilation[1]) for kx in range(shape.kernel[1]))
            result = b.bind("total", b.load(total, 0, lanes))
            spot = self.target._replace(place=self.target.place + (x + i) * shape.out_c)
            sweep.finish(spot, self.vector, result, end - begin, columns)

    def _windows(self, column: int, size: int) -> list[tuple[int, int]]:
        """The results whose windows see a column, and where in the window it is."""
        shape = self.sweep.shape
        steps = (column - i * shape.strides[1] for i in range(size))
        found = [(i, divmod(step, shape.dilation[1])) for i, step in enumerate(steps) if step >= 0]
        return [(i, kx) for i, (kx, rest) in found if rest == 0 and kx < shape.kernel[1]]
