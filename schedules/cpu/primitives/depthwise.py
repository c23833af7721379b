"""A depthwise convolution: any kernel, strides, padding and dilation, with its epilogue.

Where a model puts the input and the result side by side (a ghost module), both are written at once: the input is there.

And, for blocks that make their rows themselves, one row of a 3x3 one over a channel-blocked buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu.builder import Buffer, Builder, Expr
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.microkernel import PART
from schedules.cpu.primitives import operands, windows
from schedules.cpu.primitives.operands import Ending, Spot
from schedules.cpu.primitives.windows import Step, Sweep, Tiling, Windows
from schedules.machines.cpus import Isa
from schedules.spec import BESIDE, Epilogue, KernelSpec

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

    The buffer is [rows, width, channel block]. Rows above and below exist (zeros at the edges of the image); columns
    left and right of it do not, so that the matrix product that fills the buffer may write its rows one after another.
    Strips at the edges leave out the missing taps.

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


@dataclass(frozen=True)
class DepthwiseShape(Windows):
    epilogue: Epilogue = field(default=Epilogue(("bias",)))
    gates: tuple[str, ...] = ()

    @property
    def beside(self) -> bool:
        """Whether the input's channels stand before the result's."""
        return BESIDE in self.epilogue.steps

    @property
    def out_c(self) -> int:
        return 2 * self.c if self.beside else self.c

    @property
    def keeps_size(self) -> bool:
        return self.strides == (1, 1) and (self.out_h, self.out_w) == (self.h, self.w)


class _Kernel(Sweep):
    shape: DepthwiseShape

    def __init__(self, shape: DepthwiseShape, isa: Isa, tiling: Tiling) -> None:
        alone, self.behind = shape.epilogue.parts
        self.by_channel = shape.epilogue.weights
        # A sum starts with the bias, where that is what comes first.
        self.biased = alone.steps[:1] == ("bias",)
        self.alone = Epilogue(alone.steps[self.biased :])
        self.taps = shape.kernel[0] * shape.kernel[1]
        super().__init__(Builder(isa.dtype, isa.stored), isa, shape, tiling)

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        """For every vector its taps, then its bias and its scale."""
        rows = [*weights["w"].reshape(self.taps, self.shape.c), *(weights[name] for name in self.by_channel)]
        channels = [slice(start, start + self.lanes) for start in self.starts()]
        return [np.stack([np.stack([row[some] for row in rows]) for some in channels]).astype(np.float32)]

    def function(self) -> tirx.PrimFunc:
        b, shape = self.b, self.shape
        self.x = b.param("x", shape.image)
        self.ending = Ending(b, self.alone, shape.result, shape.gates)
        self.both = Ending(b, self.behind, shape.result, shape.gates)
        self.pitch = (self.taps + len(self.by_channel)) * self.lanes
        self.weight = b.param("weight", (self.vectors, self.pitch // self.lanes, self.lanes))
        self.out = b.param("out", shape.result)
        self.loops(self.x)
        return b.function("depthwise")

    def start(self, vector: Expr) -> Expr:
        b, lanes = self.b, self.lanes
        return b.load(*self._packed(vector)["b"], lanes) if self.biased else b.splat(0.0, lanes)

    def row(self, vector: Expr, ky: Expr) -> Step:
        b, wide = self.b, self.shape.kernel[1]
        at = vector * self.pitch + ky * (wide * self.lanes)
        taps = [b.bind("tap", b.load(self.weight, at + kx * self.lanes, self.lanes)) for kx in range(wide)]
        return lambda kx, total, value: total + value * taps[kx]

    def finish(self, spot: Spot, vector: Expr, total: Expr, rows: Expr, columns: int) -> None:
        b, shape = self.b, self.shape
        result = self.ending.done(total, spot, self._packed(vector))
        if shape.beside:
            # A pixel of the output is two of the input wide: half of what comes before it is before the input's.
            kept = b.bind("kept", b.load(self.x, (spot.place + spot.channel) // 2, self.lanes))
            b.store(self.out, spot.place, self.both.done(kept, spot))
            spot = spot._replace(place=spot.place + shape.c, channel=spot.channel + shape.c)
            result = self.both.done(result, spot)
        b.store(self.out, spot.place, result)

    def _packed(self, vector: Expr) -> dict[str, tuple[Buffer, Expr]]:
        """Where the weights by channel of a vector lie: behind its taps."""
        places = (vector * self.pitch + (self.taps + i) * self.lanes for i in range(len(self.by_channel)))
        return {name: (self.weight, place) for name, place in zip(self.by_channel, places, strict=True)}


def _reference(shape: DepthwiseShape, arrays: Arrays) -> np.ndarray:
    out = sum((seen * arrays["w"][i, j] for i, j, seen in windows.taps(shape, arrays["x"])), np.float64(0.0))
    alone, both = shape.epilogue.parts
    result = activations.reference(alone.steps, out, dict(arrays))
    if shape.beside:
        result = np.concatenate([np.asarray(arrays["x"], np.float64), result], axis=3)
    return activations.reference(both.steps, result, dict(arrays))


class Depthwise(Generator):
    OP = "depthwise"
    TILING = Tiling

    def problem(self, spec: KernelSpec) -> DepthwiseShape | None:
        high, wide, channels = spec.weight("w").shape
        if spec.x.layout != "NHWC" or channels != spec.x.shape[3] or not operands.fit(spec, gated=True, also=(BESIDE,)):
            return None
        n, h, w, c = spec.x.shape
        problem = DepthwiseShape(
            *(n, h, w, c, (high, wide), spec["strides"], spec["padding"], spec["dilation"]),
            epilogue=spec.epilogue,
            gates=operands.gates(spec),
        )
        return problem if problem.keeps_size or not problem.beside else None

    def default_for(self, problem: DepthwiseShape, unit: Isa, threads: int) -> Tiling:
        return windows.default(problem, _unit(problem, unit), threads)

    def tilings_for(self, problem: DepthwiseShape, unit: Isa) -> list[Tiling]:
        return windows.tilings(problem, _unit(problem, unit))

    def loops(self, problem: DepthwiseShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, _unit(problem, unit), tiling)

    def reference_for(self, problem: DepthwiseShape, arrays: Arrays) -> np.ndarray:
        return _reference(problem, arrays)


def _unit(shape: DepthwiseShape, unit: Isa) -> Isa:
    """Large kernels add up more than float16 can take."""
    return unit.wide() if shape.kernel[0] * shape.kernel[1] > PART else unit
