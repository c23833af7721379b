"""MobileNetV4's universal inverted bottleneck as one kernel: 1x1, activation, depthwise, activation, 1x1, residual.

The depthwise convolution in the middle may be there or not; one before the block is a kernel of its own. Each task
takes a band of rows of results in chunks: a block of expanded channels of the rows that a chunk sees is computed into
a patch with zeros around, convolved while hot, and kept as the left operand of the last product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from tvm import tirx

from schedules import activations
from schedules.cpu import microkernel
from schedules.cpu.builder import Buffer, Builder, Expr, fill, maximum, minimum
from schedules.cpu.epilogue import applied
from schedules.cpu.generator import Arrays, Generator
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives import depthwise, operands, windows
from schedules.cpu.primitives.windows import Windows
from schedules.machines.cpus import Isa
from schedules.spec import Epilogue, KernelSpec

CACHED = 100_000  # numbers of the expanded map that a task keeps at a time
MORE = 1.3  # times the rows that all threads together may expand


@dataclass(frozen=True, kw_only=True)
class UIBShape(Windows):
    """The windows are those of the depthwise convolution, on `c` channels before they are expanded."""

    e: int
    k: int
    activation: str
    epilogue: Epilogue

    @property
    def result(self) -> tuple[int, ...]:
        return self.n, self.out_h, self.out_w, self.k

    @property
    def flops(self) -> int:
        expand, project = self.h * self.w * self.c, self.out_h * self.out_w * (self.k + math.prod(self.kernel))
        return 2 * self.n * self.e * (expand + project)


@dataclass(frozen=True)
class Tiling:
    """`bands` tasks an image, `chunk` rows of results at a time, `strip` columns, and two register tiles."""

    bands: int
    chunk: int
    strip: int
    expand_rows: int
    expand_vectors: int
    project_rows: int
    project_vectors: int
    unroll: int


def _default(shape: UIBShape, isa: Isa, threads: int = 1) -> Tiling:
    bands = _bands(shape, threads)
    chunk = max(1, min(-(-shape.out_h // bands), CACHED // (shape.out_w * shape.e)))
    expand = microkernel.tile_for(isa, shape.w * chunk, shape.e)
    project = microkernel.tile_for(isa, shape.out_w * chunk, shape.k)
    return Tiling(bands, chunk, min(shape.out_w, 7), expand.rows, expand.vectors, project.rows, project.vectors, 4)


def _bands(shape: UIBShape, threads: int) -> int:
    return min(shape.out_h, threads // math.gcd(threads, shape.n))


def _tilings(shape: UIBShape, isa: Isa) -> list[Tiling]:
    found: dict[Tiling, None] = {}
    for threads in (1, 2, 4, 8):
        start = _default(shape, isa, threads)
        expands = microkernel.tiles(isa, shape.h * shape.w, shape.e)[:3]
        projects = microkernel.tiles(isa, shape.out_h * shape.out_w, shape.k)[:3]
        for chunk, strip, expand, project in product({start.chunk, -(-start.chunk // 2)}, (4, 7), expands, projects):
            chosen = replace(start, chunk=chunk, strip=min(shape.out_w, strip))
            chosen = replace(chosen, expand_rows=expand.rows, expand_vectors=expand.vectors)
            found[replace(chosen, project_rows=project.rows, project_vectors=project.vectors)] = None
    return list(found)


class _Kernel:
    def __init__(self, shape: UIBShape, isa: Isa, tiling: Tiling) -> None:
        self.shape, self.isa, self.tiling = shape, isa, tiling
        # A register tile cannot be higher than the fewest rows that a product may meet.
        whole = tiling.bands == 1 and tiling.chunk >= shape.out_h
        seen = min(shape.h, (shape.out_h - 1) * shape.strides[0] - shape.padding[0] + shape.kernel[0]) if whole else 1
        made = shape.out_h if whole else 1
        self.expand = Tile(min(seen * shape.w, tiling.expand_rows), tiling.expand_vectors, tiling.unroll)
        self.project = Tile(min(made * shape.out_w, tiling.project_rows), tiling.project_vectors, tiling.unroll)
        self.block = tiling.expand_vectors * isa.lanes
        self.blocks = microkernel.panels(shape.e, self.expand, isa)
        self.taps = math.prod(shape.kernel)
        self.line = (shape.w + shape.padding[1] + shape.padding[3]) * self.block
        self.active = Epilogue(("bias", shape.activation))
        self.b = Builder(isa.dtype, isa.stored)

    @property
    def _pointwise(self) -> bool:
        return self.taps == 1

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        shape = self.shape
        project = np.zeros((self.blocks * self.block, shape.k), np.float32)
        project[: shape.e] = weights["pr_w"]
        expand = microkernel.pack(weights["ex_w"], self.expand, self.isa)
        packed = [expand, depthwise.pack([weights["ex_b"]], self.block)]
        if not self._pointwise:
            rows = [*weights["dw_w"].reshape(self.taps, shape.e), weights["dw_b"]]
            packed.append(depthwise.pack(rows, self.block))
        return [*packed, microkernel.pack(project, self.project, self.isa), np.asarray(weights["pr_b"], np.float32)]

    def function(self) -> tirx.PrimFunc:
        shape, b, isa, bands = self.shape, self.b, self.isa, self.tiling.bands
        self.x = b.param("x", shape.image)
        self.others = operands.parameters(b, shape.epilogue.operands, shape.result)
        self.expand_w = b.param("expand_w", (self.blocks, shape.c, self.block))
        self.expand_b = b.param("expand_b", (self.blocks, 1, self.block))
        if not self._pointwise:
            self.depth_w = b.param("depth_w", (self.blocks, self.taps + 1, self.block))
        panels = microkernel.panels(shape.k, self.project, isa)
        self.project_w = b.param("project_w", (panels, self.blocks * self.block, self.project.vectors * isa.lanes))
        self.project_b = b.param("project_b", (shape.k,))
        self.out = b.param("out", shape.result)
        with b.loop("task", shape.n * bands, "parallel") as task:
            image = b.compute_once("image", task // bands)
            first = b.compute_once("first", task % bands * shape.out_h // bands)
            last = b.compute_once("last", (task % bands + 1) * shape.out_h // bands)
            self._band(image, first, last)
        return b.function("uib")

    def _band(self, image: Expr, first: Expr, last: Expr) -> None:
        """Rows first .. last of the results of one image, `chunk` at a time."""
        shape, b, chunk = self.shape, self.b, self.tiling.chunk
        lines = (chunk - 1) * shape.strides[0] + shape.kernel[0]
        z = b.alloc("z", self.blocks * chunk * shape.out_w * self.block)
        patch = z if self._pointwise else b.alloc("patch", lines * self.line)
        if not self._pointwise:
            with b.loop("line", lines) as line:
                fill(b, self.isa.lanes, patch, line * self.line, self.line)
        with b.loop("chunk", (last - first + chunk - 1) // chunk) as index:
            low = b.compute_once("low", first + index * chunk)
            count = b.compute_once("count", minimum(chunk, last - low))
            top = b.compute_once("top", low * shape.strides[0] - shape.padding[0])
            seen = b.compute_once("seen", (count - 1) * shape.strides[0] + shape.kernel[0])
            begin = b.compute_once("begin", maximum(top, 0))
            end = b.compute_once("end", minimum(top + seen, shape.h))
            if not self._pointwise:
                self._cleared(patch, 0, begin - top)
                self._cleared(patch, end - top, top + seen - end)
            with b.loop("block", self.blocks) as block:
                self._expanded(block, image, top, begin, end, patch)
                if not self._pointwise:
                    with b.loop("y", count) as y:
                        self._convolved(block, patch, y, z)
            self._projected(z, b.compute_once("position", (image * shape.out_h + low) * shape.out_w), count)

    def _cleared(self, patch: Buffer, first: Expr, count: Expr) -> None:
        """Lines of the patch that are beyond the image."""
        with self.b.loop("line", count) as line:
            fill(self.b, self.isa.lanes, patch, (first + line) * self.line, self.line)

    def _expanded(self, block: Expr, image: Expr, top: Expr, begin: Expr, end: Expr, patch: Buffer) -> None:
        """Rows begin .. end of the image, a block of channels, in their places in the patch."""
        shape, b = self.shape, self.b
        start = b.compute_once("start", (image * shape.h + begin) * shape.w)
        a = Rows(self.x, lambda row: (start + row) * shape.c, ((shape.c, 1),))

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            if self._pointwise:
                place = (block * (self.tiling.chunk * shape.out_w) + row) * self.block
            else:
                y, x = row // shape.w, row % shape.w
                place = (begin - top + y) * self.line + (shape.padding[1] + x) * self.block
            operand = operands.at(b, {}, 0, self.expand_b, column)
            channel = column - block * self.block
            b.store(patch, b.compute_once("place", place + channel), applied(b, self.active, value, operand))

        rows = b.compute_once("rows", (end - begin) * shape.w)
        padded = self.blocks * self.block  # the weights beyond e are zeros, and so are those that read the results
        most = min(shape.h, (self.tiling.chunk - 1) * shape.strides[0] + shape.kernel[0]) * shape.w
        microkernel.gemm(b, self.isa, self.expand, a, self.expand_w, rows, padded, finish, (block, 1), most)

    def _convolved(self, block: Expr, patch: Buffer, y: Expr, z: Buffer) -> None:
        """A row of results of the depthwise convolution, in strips."""
        shape, b, lanes, size = self.shape, self.b, self.isa.lanes, self.tiling.strip
        line = b.compute_once("line", y * (shape.strides[0] * self.line))
        target = b.compute_once("target", (block * self.tiling.chunk + y) * shape.out_w * self.block)
        taps = b.compute_once("taps", block * ((self.taps + 1) * self.block))

        def strip(x: Expr, width: int, channel: Expr) -> None:
            source = b.compute_once("source", line + x * (shape.strides[1] * self.block) + channel)
            for i, total in enumerate(self._sums(width, patch, source, taps + channel)):
                result = applied(b, Epilogue((shape.activation,)), total, operands.at(b, {}, 0))
                b.store(z, target + (x + i) * self.block + channel, result)

        with b.loop("vector", self.block // lanes) as vector:
            channel = b.compute_once("channel", vector * lanes)
            whole, rest = divmod(shape.out_w, size)
            with b.loop("strip", whole) as index:
                strip(b.compute_once("x", index * size), size, channel)
            if rest:
                strip(whole * size, rest, channel)

    def _sums(self, size: int, patch: Buffer, source: Expr, taps: Expr) -> list[Expr]:
        """Neighbouring results, for which values and taps are loaded once."""
        shape, b, lanes, across = self.shape, self.b, self.isa.lanes, self.shape.strides[1]
        high, wide = shape.kernel
        sums: list[Expr] = [b.bind("bias", b.load(self.depth_w, taps + self.taps * self.block, lanes))] * size
        for ky in range(high):
            places = [taps + (ky * wide + kx) * self.block for kx in range(wide)]
            row = [b.bind("tap", b.load(self.depth_w, place, lanes)) for place in places]
            for column in range((size - 1) * across + wide):
                value = b.bind("value", b.load(patch, source + ky * self.line + column * self.block, lanes))
                for i in range(size):
                    if 0 <= column - i * across < wide:
                        sums[i] = b.bind("sum", sums[i] + value * row[column - i * across])
        return sums

    def _projected(self, z: Buffer, position: Expr, count: Expr) -> None:
        shape, b = self.shape, self.b
        pitch = self.tiling.chunk * shape.out_w * self.block
        a = Rows(z, lambda row: row * self.block, ((self.blocks, pitch), (self.block, 1)))

        def finish(row: Expr, column: Expr, value: Expr) -> None:
            place = b.compute_once("place", (position + row) * shape.k + column)
            operand = operands.at(b, self.others, place, self.project_b, column)
            b.store(self.out, place, applied(b, shape.epilogue, value, operand))

        rows = b.compute_once("rows", count * shape.out_w)
        most = self.tiling.chunk * shape.out_w
        microkernel.gemm(b, self.isa, self.project, a, self.project_w, rows, shape.k, finish, most=most)


def _reference(shape: UIBShape, arrays: Arrays) -> np.ndarray:
    def active(value: np.ndarray) -> np.ndarray:
        return np.asarray(activations.activated(shape.activation, value, activations.Numpy()))

    z = active(np.asarray(arrays["x"], np.float64) @ arrays["ex_w"] + arrays["ex_b"])
    if math.prod(shape.kernel) > 1:
        z = sum((seen * arrays["dw_w"][i, j] for i, j, seen in windows.taps(shape, z)), arrays["dw_b"])
        z = active(z)
    return activations.reference(shape.epilogue.steps, z @ arrays["pr_w"], {**arrays, "b": arrays["pr_b"]})


class UIB(Generator):
    OP = "uib"
    TILING = Tiling

    def pays(self, problem: UIBShape, threads: int) -> bool:
        """Where the expanded map is too large for a cache; or convolved, if threads see few rows that others expand."""
        if math.prod(problem.kernel) == 1:
            return problem.h * problem.w * problem.e > CACHED
        bands = _bands(problem, threads)
        rows = -(-problem.out_h // bands)
        seen = min(problem.h, (rows - 1) * problem.strides[0] + problem.kernel[0])
        return seen * bands <= MORE * problem.h

    def problem(self, spec: KernelSpec) -> UIBShape | None:
        if not operands.fit(spec) or spec.epilogue.steps[:1] != ("bias",) or "scale" in spec.epilogue.steps:
            return None
        n, h, w, c = spec.x.axes("NHWC")
        names = [weight.name for weight in spec.weights]
        high, wide, e = spec.weight("dw_w").shape if "dw_w" in names else (1, 1, spec.weight("ex_b").shape[0])
        return UIBShape(
            n=n,
            h=h,
            w=w,
            c=c,
            kernel=(high, wide),
            strides=spec["strides"],
            padding=spec["padding"],
            e=e,
            k=spec.weight("pr_b").shape[0],
            activation=spec["activation"],
            epilogue=spec.epilogue,
        )

    def default_for(self, problem: UIBShape, unit: Isa, threads: int) -> Tiling:
        return _default(problem, unit, threads)

    def tilings_for(self, problem: UIBShape, unit: Isa) -> list[Tiling]:
        return _tilings(problem, unit)

    def loops(self, problem: UIBShape, unit: Isa, tiling: Tiling, threads: int) -> _Kernel:
        return _Kernel(problem, unit, tiling)

    def reference_for(self, problem: UIBShape, arrays: Arrays) -> np.ndarray:
        return _reference(problem, arrays)
