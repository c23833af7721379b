"""A row of a 3x3 depthwise convolution over a channel-blocked buffer: [rows, width, channel block].

Rows above and below exist (zeros at the edges of the image); columns left and right of it do not, so that the matrix
product that fills the buffer may write its rows one after another. Strips at the edges leave out the missing taps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from schedules.cpu.builder import Buffer, Builder, Expr
from schedules.cpu.isa import Isa

TAPS = 9  # followed by the bias in the packed weights


def pack(rows: list[np.ndarray], block: int) -> np.ndarray:
    """Vectors over channels as [blocks, rows, block], zeros beyond the last channel."""
    stacked = np.stack([np.asarray(row, np.float32) for row in rows])
    count, channels = stacked.shape
    blocks = -(-channels // block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, :channels] = stacked
    return np.ascontiguousarray(padded.reshape(count, blocks, block).transpose(1, 0, 2))


def depthwise_row(
    b: Builder,
    isa: Isa,
    source: Buffer,
    top: Expr,
    width: int,
    block: int,
    weight: Buffer,
    taps: Expr,
    strip: int,
    finish: Callable[[Expr, Expr, list[Expr]], None],
) -> None:
    """One row of results, whose upper neighbours start at source[top] and whose taps start at weight[taps].

    `finish(x, channel, values)` gets vectors of channels of the block, for the columns from x on.
    """

    def run(x: Expr, size: int, left: bool, right: bool) -> None:
        with b.loop("vector", block // isa.lanes) as vector:
            channel = b.compute_once("channel", vector * isa.lanes)
            start = b.compute_once("strip_start", top + x * block + channel)
            finish(x, channel, _strip(b, isa, source, start, width, block, weight, taps + channel, size, left, right))

    strips = -(-width // strip)
    if strips == 1:
        return run(0, width, True, True)
    run(0, strip, True, False)
    if strips > 2:
        with b.loop("strip", strips - 2) as index:
            run(b.compute_once("x", (index + 1) * strip), strip, False, False)
    last = (strips - 1) * strip
    return run(last, width - last, False, True)


def _strip(
    b: Builder,
    isa: Isa,
    source: Buffer,
    top: Expr,
    width: int,
    block: int,
    weight: Buffer,
    taps: Expr,
    size: int,
    left: bool,
    right: bool,
) -> list[Expr]:
    """Sums for `size` neighbouring columns; `left` and `right` say that the strip ends at that edge."""
    lanes = isa.lanes
    bias = b.bind("bias", b.load(weight, taps + TAPS * block, lanes))
    sums: list[Expr] = [bias] * size
    columns = range(0 if left else -1, size if right else size + 1)
    for ky in range(3):
        row = top + ky * width * block
        values = {i: b.bind("value", b.load(source, row + i * block, lanes)) for i in columns}
        for kx in range(3):
            tap = b.bind("tap", b.load(weight, taps + (3 * ky + kx) * block, lanes))
            for i in range(size):
                if i + kx - 1 in values:
                    sums[i] = b.bind("sum", sums[i] + values[i + kx - 1] * tap)
    return sums
