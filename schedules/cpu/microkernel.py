"""The register tile: a few rows of A times a few vectors of packed B, accumulated in registers.

B is packed as [panels, depth, panel width], a panel being what the tile covers of N, so that a tile reads it straight
through. A may be any matrix whose rows start anywhere and whose depth is a nest of strides: activations in NHWC, a
channel-blocked scratch buffer, or the windows of a convolution. Where the CPU multiplies by a lane of a vector,
neighbours along the depth load as one. What happens to a result is the caller's `finish`.

In float16 only some PART of the depth is accumulated, where the error stays near that of the operands' own rounding;
the parts are added up in float32. Every step in float32 would take twice the instructions and more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from schedules.cpu.builder import Buffer, Builder, Expr, minimum, splat
from schedules.cpu.lanes import lane
from schedules.machines.cpus import Isa

PART = 64  # steps of the depth whose sum may stay in float16: its error grows as their square root

LINE = 64  # bytes that a CPU reads from memory at once
FEW = 16  # passes over a panel, of which the first one waits for the memory

# ahead(k): what is done besides at a place in the depth.
Ahead = Callable[[Expr], None]
# finish(row, column, value): value holds one or more neighbouring columns of the result, in the builder's type.
Finish = Callable[[Expr, Expr, Expr], None]


@dataclass(frozen=True)
class Tile:
    """`rows` x `vectors` accumulators; `unroll` steps of the depth a turn."""

    rows: int
    vectors: int
    unroll: int = 4


@dataclass(frozen=True)
class Rows:
    """The left operand: element (row, k0, k1, ..) is buffer[start(row) + k0 * step0 + k1 * step1 ..].

    `depth` lists (extent, step) from the outermost to the innermost.
    """

    buffer: Buffer
    start: Callable[[Expr], Expr]
    depth: tuple[tuple[int, int], ...]


def panels(columns: int, tile: Tile, isa: Isa) -> int:
    """How many panels N columns take."""
    return -(-columns // (tile.vectors * isa.lanes))


def pack(weight: np.ndarray, tile: Tile, isa: Isa) -> np.ndarray:
    """[K, N] as [panels, K, panel width], zeros beyond N."""
    depth, columns = weight.shape
    width = tile.vectors * isa.lanes
    count = panels(columns, tile, isa)
    padded = np.zeros((depth, count * width), np.float32)
    padded[:, :columns] = weight
    return np.ascontiguousarray(padded.reshape(depth, count, width).transpose(1, 0, 2))


def tiles(isa: Isa, rows: int, columns: int) -> list[Tile]:
    """Every tile that fits the registers, best first: it wastes little of `rows` and `columns`, and loads least."""
    fitting = [
        Tile(height, vectors)
        for vectors in (1, 2, 3, 4)
        for height in range(1, min(rows, 14) + 1)
        if height * vectors + vectors + height * isa.by_lane < isa.registers
    ]
    return sorted(fitting, key=lambda tile: cost(isa, tile, rows, columns))


def tile_for(isa: Isa, rows: int, columns: int) -> Tile:
    return tiles(isa, rows, columns)[0]


def cost(isa: Isa, tile: Tile, rows: int, columns: int) -> float:
    """Cycles to multiply all rows by all columns, for each step of the depth."""
    vectors = -(-columns // isa.lanes)
    waste = (vectors % tile.vectors > 0) * 0.1  # a tail panel is narrower and slower
    return -(-rows // tile.rows) * (vectors / tile.vectors + waste) * _cycles(isa, tile)


def _cycles(isa: Isa, tile: Tile) -> float:
    """Of a step of the depth."""
    # Where a multiply-add takes a lane, neighbours along the depth load as one, and so do two vectors of B.
    loads = tile.rows / isa.lanes + tile.vectors / 2 if isa.by_lane else tile.rows + tile.vectors
    return isa.core.cycles(tile.rows * tile.vectors, loads)


def gemm(
    b: Builder,
    isa: Isa,
    tile: Tile,
    a: Rows,
    weight: Buffer,
    rows: Expr,
    columns: int,
    finish: Finish,
    some: tuple[Expr, Expr] | None = None,
    most: int = 0,
    begin: Expr = 0,
) -> None:
    """All rows (at least `tile.rows` of them) times all columns, or times the panels first .. first + count.

    B begins at weight[begin].

    The last tile is moved up to end where the rows end, so that some results are computed twice: `finish` must not
    accumulate into what it stores to. With `most` rows at the most, each panel is fetched while the one before it is
    multiplied: with few rows the CPU would else wait for the memory in every panel's first tile.
    """
    width = tile.vectors * isa.lanes
    passes = -(-most // tile.rows)
    full = columns // width
    rest = columns - full * width
    first, count = some or (0, full + (rest > 0))
    within = count if not rest else minimum(count, full - first)
    if full:
        with b.loop("panel", within) as panel:
            _panel(b, isa, tile, a, weight, rows, first + panel, width, finish, begin, passes=passes)
    if rest:
        narrow = Tile(tile.rows, -(-rest // isa.lanes), tile.unroll)
        if some is None:
            _panel(b, isa, narrow, a, weight, rows, full, rest, finish, begin, width)
        else:
            with b.when(first + count > full):
                _panel(b, isa, narrow, a, weight, rows, full, rest, finish, begin, width)


def _panel(
    b: Builder,
    isa: Isa,
    tile: Tile,
    a: Rows,
    weight: Buffer,
    rows: Expr,
    panel: Expr,
    columns: int,
    finish: Finish,
    begin: Expr,
    pitch: int | None = None,
    passes: int = 0,
) -> None:
    """All rows times one panel, of which `columns` columns are wanted."""
    pitch = pitch or tile.vectors * isa.lanes
    depth = int(np.prod([extent for extent, _ in a.depth]))
    column = b.compute_once("column", panel * pitch)
    base = b.compute_once("base", begin + column * depth)
    with b.loop("tile", (rows + tile.rows - 1) // tile.rows) as index:
        row = b.compute_once("row", minimum(index * tile.rows, rows - tile.rows))
        ahead = _fetched(b, tile, weight, base + depth * pitch, depth, pitch, index, passes)
        _tile(b, isa, tile, a, weight, row, base, pitch, column, columns, finish, ahead)


def _fetched(
    b: Builder, tile: Tile, weight: Buffer, start: Expr, depth: int, pitch: int, index: Expr, passes: int
) -> Ahead | None:
    """Fetches `depth` rows of weights from `start` on, in so many passes over the depth; this is number `index`."""
    line = LINE // np.dtype(str(weight.dtype)).itemsize
    if not 0 < passes <= FEW or depth * pitch < FEW * line or line % tile.unroll:
        return None
    lines = -(-tile.unroll * pitch // (line * passes))  # a turn

    def ahead(k: Expr) -> None:
        place = start + (index * depth + k) * (lines * line // tile.unroll)
        for i in range(lines):
            b.prefetch(weight, place + i * line)

    return ahead


def _tile(
    b: Builder,
    isa: Isa,
    tile: Tile,
    a: Rows,
    weight: Buffer,
    row: Expr,
    base: Expr,
    pitch: int,
    column: Expr,
    columns: int,
    finish: Finish,
    ahead: Ahead | None = None,
) -> None:
    lanes = isa.lanes
    sums = _cleared(b, tile, lanes, "sum", isa.dtype)
    starts = [b.compute_once(f"start{i}", a.start(row + i)) for i in range(tile.rows)]

    def steps(offset: Expr, k: Expr, count: int) -> None:
        """`count` steps of the depth, along which the elements of a row are neighbours where it is more than one."""
        together = [b.load(a.buffer, start + offset, count, isa.dtype) for start in starts]
        if count > 1:
            together = [b.bind("ahead", values) for values in together]
        for i in range(count):
            places = [base + (k + i) * pitch + j * lanes for j in range(tile.vectors)]
            factors = [b.bind(f"w{j}", b.load(weight, place, lanes, isa.dtype)) for j, place in enumerate(places)]
            for values, line in zip(together, sums, strict=True):
                value = b.bind("a", lane(values, i, lanes) if count > 1 else splat(values, lanes))
                for total, factor in zip(line, factors, strict=True):
                    b.store(total, 0, b.load(total, 0, lanes, isa.dtype) + value * factor)

    totals = sums
    group = isa.lanes if isa.by_lane and a.depth[-1][1] == 1 else 1
    if isa.dtype == "float32" or int(np.prod([extent for extent, _ in a.depth])) <= PART:
        _reduce(b, a.depth, tile.unroll, group, 0, 0, steps, ahead)
    else:
        totals = _cleared(b, tile, lanes, "total", "float32")

        def part(inner: tuple[tuple[int, int], ...], offset: Expr, k: Expr) -> None:
            _reduce(b, inner, tile.unroll, group, offset, k, steps)
            for line, wide in zip(sums, totals, strict=True):
                for each, total in zip(line, wide, strict=True):
                    more = b.load(each, 0, lanes, "float32")
                    b.store(total, 0, b.load(total, 0, lanes, "float32") + more)
                    b.store(each, 0, splat(0.0, lanes, isa.dtype))

        _in_parts(b, a.depth, 0, 0, part)
    for i, line in enumerate(totals):
        for j, total in enumerate(line):
            wanted = min(lanes, columns - j * lanes)
            for start, width in pieces(wanted, lanes):
                finish(row + i, column + j * lanes + start, b.load(total, start, width))


def _cleared(b: Builder, tile: Tile, lanes: int, name: str, dtype: str) -> list[list[Buffer]]:
    """An accumulator for each vector of the tile, all zeros."""
    sums = [[b.cell(f"{name}{i}_{j}", lanes, dtype) for j in range(tile.vectors)] for i in range(tile.rows)]
    for line in sums:
        for total in line:
            b.store(total, 0, splat(0.0, lanes, dtype))
    return sums


def _in_parts(
    b: Builder,
    depth: tuple[tuple[int, int], ...],
    offset: Expr,
    k: Expr,
    body: Callable[[tuple[tuple[int, int], ...], Expr, Expr], None],
) -> None:
    """Call `body` for even parts of the depth of about PART points."""
    (extent, stride), *inner = depth
    below = int(np.prod([size for size, _ in inner]))
    if below > PART:
        with b.loop("k", extent) as outer:
            _in_parts(b, tuple(inner), offset + outer * stride, k + outer * below, body)
        return
    size = -(-extent // -(-extent * below // PART))
    whole, rest = divmod(extent, size)
    with b.loop("part", whole) as part:
        body(((size, stride), *inner), offset + part * (size * stride), k + part * (size * below))
    if rest:
        body(((rest, stride), *inner), offset + whole * size * stride, k + whole * size * below)


def _reduce(
    b: Builder,
    depth: tuple[tuple[int, int], ...],
    unroll: int,
    group: int,
    offset: Expr,
    k: Expr,
    steps: Callable[[Expr, Expr, int], None],
    ahead: Ahead | None = None,
) -> None:
    """Call `steps` for all of the depth, at most `group` points at once, the innermost loop unrolled.

    And `ahead` with the place in the depth at every turn of it.
    """
    (extent, stride), *inner = depth
    if inner:
        below = int(np.prod([size for size, _ in inner]))
        with b.loop("k", extent) as outer:
            _reduce(b, tuple(inner), unroll, group, offset + outer * stride, k + outer * below, steps, ahead)
        return
    unroll = max(unroll, group)
    turns, rest = divmod(extent, unroll)
    if turns:
        with b.loop("k", turns) as turn:
            if ahead:
                ahead(k + turn * unroll)
            for i, count in pieces(unroll, group):
                steps(offset + (turn * unroll + i) * stride, k + turn * unroll + i, count)
    for i, count in pieces(rest, group):
        steps(offset + (extent - rest + i) * stride, k + (extent - rest + i), count)


def pieces(wanted: int, lanes: int) -> list[tuple[int, int]]:
    """`wanted` lanes as (start, width) with widths that are powers of two."""
    found, start = [], 0
    while start < wanted:
        width = lanes
        while width > wanted - start:
            width //= 2
        found.append((start, width))
        start += width
    return found
