"""Convolutions as products of matrices: every work-item keeps a tile of channels by positions in registers.

Bias, GELU, a residual and a rank-one term ride along, so nothing is written that the next kernel would only add to.
There is no staging through local memory: on most mobile GPUs that is main memory by another name, and the caches hold
what neighbouring work-items share.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.launch import Launch, Limits, blocks, gelu, kernel

POSITIONS = 16  # work-items side by side along the positions


@dataclass(frozen=True)
class ConvShape:
    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    activation: str | None = None

    @property
    def out(self) -> tuple[int, int, int, int]:
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in (self.h, self.w))
        return self.n, self.k, height, width


def conv(
    shape: ConvShape,
    limits: Limits,
    *,
    x: str = "x",
    weights: str = "w",
    residual: str | None = None,
    rank_one: tuple[str, str] | None = None,
    out: str = "out",
) -> Launch:
    """out = act(weights * x + bias - rank_one[0] (by position) * rank_one[1] (by channel)) + residual."""
    n, k, height, width = shape.out
    positions = height * width
    pointwise = shape.kernel == 1 and shape.stride == 1 and shape.padding == 0
    lanes = 4 if pointwise and positions % 4 == 0 else 1  # loads of four numbers are the widest everywhere
    channels = next(size for size in (4, 2, 1) if k % size == 0)
    columns, rows = blocks(positions, lanes), k // channels
    ty = limits.wave // POSITIONS
    reads = {x: (n, shape.c, shape.h, shape.w), f"{weights}_w": _weight_shape(shape), f"{weights}_b": (k,)}
    if rank_one:
        reads |= {rank_one[0]: (n, 1, height, width), rank_one[1]: (k,)}
    if residual and residual not in reads:
        reads[residual] = shape.out
    body = f"""
if bx * {POSITIONS} + tx < {columns} and by * {ty} + ty < {rows}:
    for j in T.unroll({channels}):
        for v in T.vectorized({lanes}):
            acc[j * {lanes} + v] = {weights}_b[(by * {ty} + ty) * {channels} + j]
{_product(shape, x, weights, lanes, channels, ty, pointwise)}
    for j in T.unroll({channels}):
        for v in T.vectorized({lanes}):
            {_epilogue(shape, positions, lanes, channels, ty, rank_one)}
            {out}[{_at(k, positions, lanes, channels, ty)}] = {_result(shape, residual, positions, lanes, channels, ty)}
"""
    return kernel(
        "conv",
        reads,
        out,
        shape.out,
        grid=(blocks(columns, POSITIONS), blocks(rows, ty), n),
        group=(POSITIONS, ty),
        body=body,
        private={"acc": lanes * channels, "xs": lanes, "ws": channels},
    )


def _weight_shape(shape: ConvShape) -> tuple[int, ...]:
    taps = (shape.kernel, shape.kernel) if shape.kernel > 1 else ()
    return (*taps, shape.c, shape.k)


def _product(shape: ConvShape, x: str, weights: str, lanes: int, channels: int, ty: int, pointwise: bool) -> str:
    area = shape.h * shape.w
    update = f"""
for j in T.vectorized({channels}):
    ws[j] = {weights}_w[TAP * {shape.k} + (by * {ty} + ty) * {channels} + j]
for j in T.unroll({channels}):
    for v in T.vectorized({lanes}):
        acc[j * {lanes} + v] = acc[j * {lanes} + v] + ws[j] * xs[v]
"""
    if pointwise:
        load = f"""
for v in T.vectorized({lanes}):
    xs[v] = {x}[(bz * {shape.c} + i) * {area} + (bx * {POSITIONS} + tx) * {lanes} + v]
"""
        inner = (load + update.replace("TAP", "i")).strip("\n")
        return _indented(f"for i in range({shape.c}):\n" + _indented(inner))
    width = shape.out[3]
    row = f"((bx * {POSITIONS} + tx) // {width} * {shape.stride} + dy - {shape.padding})"
    column = f"((bx * {POSITIONS} + tx) % {width} * {shape.stride} + dx - {shape.padding})"
    inside = f"{row} >= 0 and {row} < {shape.h} and {column} >= 0 and {column} < {shape.w}"
    load = f"""
xs[0] = T.float32(0)
if {inside}:
    xs[0] = {x}[(bz * {shape.c} + i) * {area} + {row} * {shape.w} + {column}]
"""
    tap = f"((dy * {shape.kernel} + dx) * {shape.c} + i)"
    inner = (load + update.replace("TAP", tap)).strip("\n")
    loops = (
        f"for dy in range({shape.kernel}):\n    for dx in range({shape.kernel}):\n        for i in range({shape.c}):\n"
    )
    return _indented(loops + _indented(inner, 3))


def _at(k: int, positions: int, lanes: int, channels: int, ty: int) -> str:
    channel = f"bz * {k} + (by * {ty} + ty) * {channels} + j"
    return f"({channel}) * {positions} + (bx * {POSITIONS} + tx) * {lanes} + v"


def _epilogue(
    shape: ConvShape, positions: int, lanes: int, channels: int, ty: int, rank_one: tuple[str, str] | None
) -> str:
    acc = f"acc[j * {lanes} + v]"
    if rank_one is None:
        return f"{acc} = {acc}"
    by_position, by_channel = rank_one
    position = f"bz * {positions} + (bx * {POSITIONS} + tx) * {lanes} + v"
    return f"{acc} = {acc} - {by_position}[{position}] * {by_channel}[(by * {ty} + ty) * {channels} + j]"


def _result(shape: ConvShape, residual: str | None, positions: int, lanes: int, channels: int, ty: int) -> str:
    value = f"acc[j * {lanes} + v]"
    value = gelu(value) if shape.activation == "gelu" else value
    return f"{value} + {residual}[{_at(shape.k, positions, lanes, channels, ty)}]" if residual else value


def _indented(text: str, levels: int = 1) -> str:
    return "\n".join("    " * levels + line for line in text.split("\n"))
