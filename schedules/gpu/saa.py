"""SAA in four launches, or three where every position is a token:

* measure: mean and spread of every position, and what it adds to the saliency of its nine neighbours
* sample: a work-group a window; softmax of its saliency, then its token
* attend: a work-group a head; keys and values of all tokens stay in its local memory, scores in registers
* recover: a work-group a token; projection, spread over its window, residual

At rate 1, `normalise` takes the place of the first two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schedules.gpu.launch import FLOAT, Launch, Limits, Lowered, blocks, kernel
from schedules.gpu.reduce import PARTS, SIDE

TAPS = 9
STATISTICS = 2 + TAPS  # mean, 1 / deviation, and a share for each neighbour
GROUP = 128
NO_SHARE = -1e30  # the saliency of positions beyond the image
MOST_WINDOW = 128  # positions of a window: one for each work-item


@dataclass(frozen=True)
class SAAShape:
    n: int
    h: int
    w: int
    c: int
    heads: int
    r: int
    eps: float = 1e-5
    scale: float = 0.25

    @property
    def area(self) -> int:
        return self.h * self.w

    @property
    def columns(self) -> int:
        return -(-self.w // self.r)

    @property
    def tokens(self) -> int:
        return -(-self.h // self.r) * self.columns

    @property
    def dim(self) -> int:
        return self.c // self.heads


def saa(shape: SAAShape, weights: dict[str, np.ndarray], limits: Limits) -> Lowered | None:
    """None where a head's keys and values do not fit into local memory, or a window not into a work-group."""
    if (
        2 * shape.tokens * shape.dim * FLOAT > limits.local_bytes
        or shape.r**2 > MOST_WINDOW
        or limits.work_group < GROUP
        or shape.c % shape.heads
    ):
        return None
    if shape.r == 1:
        launches = [_normalise(shape), _attend(shape), _recover(shape)]
    else:
        launches = [_measure(shape), _sample(shape), _attend(shape), _recover(shape)]
    return Lowered(launches, _constants(shape, weights))


def _constants(shape: SAAShape, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The affine part of the layer norm goes into the saliency, the scale of the scores into the query."""
    found = {name: weights[name] for name in ("ln_g", "ln_b", "pr_w", "pr_b")}
    scale = np.ones(3 * shape.c, "float32")
    scale[: shape.c] = shape.scale
    found["qkv_w"], found["qkv_b"] = weights["qkv_w"] * scale, weights["qkv_b"] * scale
    if shape.r > 1:
        taps = weights["sal_w"].reshape(TAPS, shape.c).astype("float64")
        found["sal_w"] = taps * weights["ln_g"]
        found["sal_b"] = taps @ weights["ln_b"].astype("float64")
        found["in_window"] = np.broadcast_to(weights["sal_b"], (shape.r, shape.r)).reshape(-1)
        found["up_w"], found["up_b"] = weights["up_w"], weights["up_b"]
    return {name: np.ascontiguousarray(value, "float32") for name, value in found.items()}


def _image(shape: SAAShape) -> tuple[int, ...]:
    return shape.n, shape.c, shape.h, shape.w


def _moments(shape: SAAShape, at_each: str = "") -> str:
    """Mean and spread of a position, the latter in two passes because squares cancel; `at_each` sees d = x - mean."""
    position = f"bx * {SIDE} + tx"
    element = f"x[(by * {shape.c} + i * {PARTS} + ty) * {shape.area} + {position}]"
    return f"""
acc[0] = T.float32(0)
if {position} < {shape.area}:
    for i in range({blocks(shape.c, PARTS)}):
        if i * {PARTS} + ty < {shape.c}:
            acc[0] = acc[0] + {element}
part[ty * {SIDE} + tx] = acc[0]
mean[0] = T.float32(0)
for i in range({PARTS}):
    mean[0] = mean[0] + part[i * {SIDE} + tx] * T.float32({1 / shape.c!r})
for s in T.unroll({STATISTICS - 1}):
    sums[s] = T.float32(0)
if {position} < {shape.area}:
    for i in range({blocks(shape.c, PARTS)}):
        if i * {PARTS} + ty < {shape.c}:
            d[0] = {element} - mean[0]
            sums[0] = sums[0] + d[0] * d[0]
{at_each}
"""


def _deviation(shape: SAAShape) -> str:
    return f"T.rsqrt(acc[0] * T.float32({1 / shape.c!r}) + T.float32({shape.eps!r}))"


def _measure(shape: SAAShape) -> Launch:
    position = f"bx * {SIDE} + tx"
    taps = f"""\
            for s in T.unroll({TAPS}):
                sums[1 + s] = sums[1 + s] + d[0] * sal_w[s * {shape.c} + i * {PARTS} + ty]"""
    body = f"""
{_moments(shape, taps)}
for s in T.unroll({TAPS + 1}):
    all[(s * {PARTS} + ty) * {SIDE} + tx] = sums[s]
acc[0] = T.float32(0)
for i in range({PARTS}):
    acc[0] = acc[0] + all[i * {SIDE} + tx]
acc[0] = {_deviation(shape)}
if {position} < {shape.area} and ty == 0:
    stats[(by * {STATISTICS}) * {shape.area} + {position}] = mean[0]
    stats[(by * {STATISTICS} + 1) * {shape.area} + {position}] = acc[0]
if {position} < {shape.area} and ty > 0 and ty <= {TAPS}:
    d[0] = T.float32(0)
    for i in range({PARTS}):
        d[0] = d[0] + all[(ty * {PARTS} + i) * {SIDE} + tx]
    stats[(by * {STATISTICS} + 1 + ty) * {shape.area} + {position}] = d[0] * acc[0] + sal_b[ty - 1]
"""
    return kernel(
        "saa_measure",
        {"x": _image(shape), "sal_w": (TAPS, shape.c), "sal_b": (TAPS,)},
        "stats",
        (shape.n, STATISTICS, shape.area),
        grid=(blocks(shape.area, SIDE), shape.n),
        group=(SIDE, PARTS),
        body=body,
        private={"acc": 1, "mean": 1, "d": 1, "sums": TAPS + 1},
        shared={"part": SIDE * PARTS, "all": (TAPS + 1) * SIDE * PARTS},
    )


def _sample(shape: SAAShape) -> Launch:
    window, columns = shape.r**2, shape.columns
    row, column = f"(bx // {columns} * {shape.r} + tx // {shape.r})", f"(bx % {columns} * {shape.r} + tx % {shape.r})"
    inside = f"{row} + dy >= 1 and {row} + dy <= {shape.h} and {column} + dx >= 1 and {column} + dx <= {shape.w}"
    here = f"{row} * {shape.w} + {column}"
    stat = f"by * {STATISTICS} * {shape.area}"
    neighbour = f"{stat} + (2 + dy * 3 + dx) * {shape.area} + {here} + (dy - 1) * {shape.w}"
    channel = f"(i * {GROUP} + tx)"
    each_row = f"(bx // {columns} * {shape.r} + p // {shape.r})"
    each_column = f"(bx % {columns} * {shape.r} + p % {shape.r})"
    each = f"(by * {shape.c} + {channel}) * {shape.area} + {each_row} * {shape.w} + {each_column}"
    reads: dict[str, tuple[int, ...]] = {
        "x": _image(shape),
        "stats": (shape.n, STATISTICS, shape.area),
        "in_window": (window,),
        "ln_g": (shape.c,),
        "ln_b": (shape.c,),
    }
    body = f"""
acc[0] = T.float32({NO_SHARE})
if tx < {window} and {row} < {shape.h} and {column} < {shape.w}:
    acc[0] = in_window[tx]
    for dy in T.unroll(3):
        for dx in T.unroll(3):
            if {inside}:
                acc[0] = acc[0] + stats[{neighbour} + dx - 1]
if tx < {window}:
    salience[tx] = acc[0]
top[0] = salience[0]
for p in range({window}):
    top[0] = T.max(top[0], salience[p])
total[0] = T.float32(0)
for p in range({window}):
    total[0] = total[0] + T.exp(salience[p] - top[0])
if tx < {window}:
    share[tx] = T.float32(0)
    means[tx] = T.float32(0)
if tx < {window} and {row} < {shape.h} and {column} < {shape.w}:
    share[tx] = T.exp(acc[0] - top[0]) / total[0] * stats[{stat} + {shape.area} + {here}]
    means[tx] = stats[{stat} + {here}]
for i in range({blocks(shape.c, GROUP)}):
    if {channel} < {shape.c}:
        acc[0] = T.float32(0)
        for p in range({window}):
            if {each_row} < {shape.h} and {each_column} < {shape.w}:
                acc[0] = acc[0] + share[p] * (x[{each}] - means[p])
        tokens[(by * {shape.tokens} + bx) * {shape.c} + {channel}] = acc[0] * ln_g[{channel}] + ln_b[{channel}]
"""
    return kernel(
        "saa_sample",
        reads,
        "tokens",
        (shape.n, shape.tokens, shape.c),
        grid=(shape.tokens, shape.n),
        group=(GROUP,),
        body=body,
        private={"acc": 1, "top": 1, "total": 1},
        shared={"salience": window, "share": window, "means": window},
    )


def _normalise(shape: SAAShape) -> Launch:
    position = f"bx * {SIDE} + tx"
    channel = f"(i * {PARTS} + ty)"
    token = f"tokens[(by * {shape.tokens} + {position}) * {shape.c} + {channel}]"
    body = f"""
{_moments(shape)}
spread[ty * {SIDE} + tx] = sums[0]
acc[0] = T.float32(0)
for i in range({PARTS}):
    acc[0] = acc[0] + spread[i * {SIDE} + tx]
acc[0] = {_deviation(shape)}
if {position} < {shape.area}:
    for i in range({blocks(shape.c, PARTS)}):
        if {channel} < {shape.c}:
            d[0] = (x[(by * {shape.c} + {channel}) * {shape.area} + {position}] - mean[0]) * acc[0]
            {token} = d[0] * ln_g[{channel}] + ln_b[{channel}]
"""
    return kernel(
        "saa_normalise",
        {"x": _image(shape), "ln_g": (shape.c,), "ln_b": (shape.c,)},
        "tokens",
        (shape.n, shape.tokens, shape.c),
        grid=(blocks(shape.area, SIDE), shape.n),
        group=(SIDE, PARTS),
        body=body,
        private={"acc": 1, "mean": 1, "d": 1, "sums": STATISTICS - 1},
        shared={"part": SIDE * PARTS, "spread": SIDE * PARTS},
    )


def _attend(shape: SAAShape) -> Launch:
    tokens, c, dim = shape.tokens, shape.c, shape.dim
    pair = 2 * dim  # of key and value
    at = f"(i * {GROUP} + tx)"
    column = f"({c} + {at} % {pair} // {dim} * {c} + by * {dim} + {at} % {dim})"
    query = f"(i * {GROUP} + tx)"
    body = f"""
for i in range({blocks(tokens * pair, GROUP)}):
    if {at} < {tokens * pair}:
        acc[0] = qkv_b[{column}]
        for k in range({c}):
            acc[0] = acc[0] + tokens[(bx * {tokens} + {at} // {pair}) * {c} + k] * qkv_w[k * {3 * c} + {column}]
        pairs[{at}] = acc[0]
for i in range({blocks(tokens, GROUP)}):
    if {query} < {tokens}:
        for j in T.unroll({dim}):
            q[j] = qkv_b[by * {dim} + j]
            mix[j] = T.float32(0)
        for k in range({c}):
            acc[0] = tokens[(bx * {tokens} + {query}) * {c} + k]
            for j in T.unroll({dim}):
                q[j] = q[j] + acc[0] * qkv_w[k * {3 * c} + by * {dim} + j]
        top[0] = T.float32(-3.0e38)
        for t in range({tokens}):
            acc[0] = T.float32(0)
            for j in T.unroll({dim}):
                acc[0] = acc[0] + q[j] * pairs[t * {pair} + j]
            top[0] = T.max(top[0], acc[0])
        total[0] = T.float32(0)
        for t in range({tokens}):
            acc[0] = T.float32(0)
            for j in T.unroll({dim}):
                acc[0] = acc[0] + q[j] * pairs[t * {pair} + j]
            acc[0] = T.exp(acc[0] - top[0])
            total[0] = total[0] + acc[0]
            for j in T.unroll({dim}):
                mix[j] = mix[j] + acc[0] * pairs[t * {pair} + {dim} + j]
        for j in T.unroll({dim}):
            mixed[(bx * {tokens} + {query}) * {c} + by * {dim} + j] = mix[j] / total[0]
"""
    return kernel(
        "saa_attend",
        {"tokens": (shape.n, tokens, c), "qkv_w": (c, 3 * c), "qkv_b": (3 * c,)},
        "mixed",
        (shape.n, tokens, c),
        grid=(shape.n, shape.heads),
        group=(GROUP,),
        body=body,
        private={"acc": 1, "top": 1, "total": 1, "q": dim, "mix": dim},
        shared={"pairs": tokens * pair},
    )


def _recover(shape: SAAShape) -> Launch:
    c, window, columns = shape.c, shape.r**2, shape.columns
    at = f"(i * {GROUP} + tx)"
    channel, p = f"({at} // {window})", f"({at} % {window})"
    row = f"(bx // {columns} * {shape.r} + {p} // {shape.r})"
    column = f"(bx % {columns} * {shape.r} + {p} % {shape.r})"
    image = f"(by * {c} + {channel}) * {shape.area} + {row} * {shape.w} + {column}"
    spread = f"whole[{channel}] * up_w[{p} * {c} + {channel}] + up_b[{channel}]" if shape.r > 1 else f"whole[{channel}]"
    body = f"""
for i in range({blocks(c, GROUP)}):
    if {at} < {c}:
        row[{at}] = mixed[(by * {shape.tokens} + bx) * {c} + {at}]
for i in range({blocks(c, GROUP)}):
    if {at} < {c}:
        acc[0] = pr_b[{at}]
        for k in range({c}):
            acc[0] = acc[0] + row[k] * pr_w[k * {c} + {at}]
        whole[{at}] = acc[0]
for i in range({blocks(c * window, GROUP)}):
    if {at} < {c * window} and {row} < {shape.h} and {column} < {shape.w}:
        out[{image}] = x[{image}] + {spread}
"""
    reads: dict[str, tuple[int, ...]] = {
        "x": _image(shape),
        "mixed": (shape.n, shape.tokens, c),
        "pr_w": (c, c),
        "pr_b": (c,),
    }
    if shape.r > 1:
        reads |= {"up_w": (shape.r, shape.r, c), "up_b": (c,)}
    return kernel(
        "saa_recover",
        reads,
        "out",
        _image(shape),
        grid=(shape.tokens, shape.n),
        group=(GROUP,),
        body=body,
        private={"acc": 1},
        shared={"row": c, "whole": c},
    )
