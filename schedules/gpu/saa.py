"""SAA in four launches, or three where every position is a token:

* measure: mean and spread of every position, and what it adds to the saliency of its nine neighbours
* sample: a work-group a window; softmax of its saliency, then its token
* attend: a work-group a head; keys and values of all tokens stay in its local memory, scores in registers
* recover: a work-group a token; projection, spread over its window, residual

At rate 1, `normalise` takes the place of the first two. Everything is computed in float32, whatever is stored:
means, exponentials and long sums are where float16 would lose what matters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from schedules.gpu import head, reduce
from schedules.gpu.launch import Buffer, Kernel, Launch, Limits, Lowered, Memory, Program, blocks, nest

TAPS = 9
STATISTICS = 2 + TAPS  # mean, 1 / deviation, and a share for each neighbour
NO_SHARE = -1e30  # the saliency of positions beyond the image


@dataclass(frozen=True)
class SAA:
    """What all of its kernels are told."""

    n: int
    h: int
    w: int
    c: int
    heads: int
    r: int
    eps: float = 1e-5
    dtype: str = "float32"

    @property
    def area(self) -> int:
        return self.h * self.w

    @property
    def window(self) -> int:
        return self.r**2

    @property
    def columns(self) -> int:
        return -(-self.w // self.r)

    @property
    def tokens(self) -> int:
        return -(-self.h // self.r) * self.columns

    @property
    def dim(self) -> int:
        return self.c // self.heads

    @property
    def image(self) -> Buffer:
        return Buffer((self.n, self.c, self.h, self.w), self.dtype)

    @property
    def statistics(self) -> Buffer:
        return Buffer((self.n, STATISTICS, self.area))

    @property
    def by_token(self) -> Buffer:
        return Buffer((self.n, self.tokens, self.c), self.dtype)

    def matrix(self, *extents: int) -> Buffer:
        return Buffer(extents, self.dtype)

    @property
    def vector(self) -> Buffer:
        return Buffer((self.c,))

    def place(self, position: str) -> tuple[str, str]:
        """Row and column of a position of the window that is work-group bx."""
        row = f"(bx // {self.columns} * {self.r} + {position} // {self.r})"
        return row, f"(bx % {self.columns} * {self.r} + {position} % {self.r})"

    def inside(self, row: str, column: str) -> str:
        return f"{row} < {self.h} and {column} < {self.w}"

    def moments(self, memory: Memory, side: int, parts: int, sums: int, *each: str) -> str:
        """Mean and spread of a position, the latter in two passes because squares cancel; `each` sees d = x - mean."""
        position, channel = f"(bx * {side} + tx)", f"(i * {parts} + ty)"
        element = memory.load("x", f"(by * {self.c} + {channel}) * {self.area} + {position}")

        def over_channels(*statements: str) -> str:
            loop = nest(f"for i in range({blocks(self.c, parts)}):", nest(f"if {channel} < {self.c}:", *statements))
            return nest(f"if {position} < {self.area}:", loop)

        return "\n".join(
            [
                "acc[0] = T.float32(0)",
                over_channels(f"acc[0] = acc[0] + {element}"),
                f"part[ty * {side} + tx] = acc[0]",
                "mean[0] = T.float32(0)",
                nest(
                    f"for i in range({parts}):",
                    f"mean[0] = mean[0] + part[i * {side} + tx] * T.float32({1 / self.c!r})",
                ),
                nest(f"for s in T.unroll({sums}):", "sums[s] = T.float32(0)"),
                over_channels(f"d[0] = {element} - mean[0]", "sums[0] = sums[0] + d[0] * d[0]", *each),
            ]
        )

    @property
    def deviation(self) -> str:
        return f"T.rsqrt(acc[0] * T.float32({1 / self.c!r}) + T.float32({self.eps!r}))"


@dataclass(frozen=True)
class Measure(SAA, Kernel):
    NAME = "saa_measure"
    KNOBS = reduce.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": self.image, "sal_w": Buffer((TAPS, self.c)), "sal_b": Buffer((TAPS,))}

    @property
    def out(self) -> Buffer:
        return self.statistics

    def offered(self, limits: Limits) -> list[reduce.Tiling]:
        return reduce.shares(self.area, limits, least=16)  # one for each neighbour, and the first

    def program(self, limits: Limits, tiling: reduce.Tiling) -> Program:
        side, parts = tiling.side, tiling.parts
        position = f"bx * {side} + tx"
        tap = f"sums[1 + s] = sums[1 + s] + d[0] * sal_w[s * {self.c} + i * {parts} + ty]"
        moments = self.moments(self.memory(limits), side, parts, TAPS + 1, nest(f"for s in T.unroll({TAPS}):", tap))
        statistic = f"out[(by * {STATISTICS} + WHICH) * {self.area} + {position}]"
        share = nest(f"for i in range({parts}):", f"d[0] = d[0] + all[(ty * {parts} + i) * {side} + tx]")
        body = [
            moments,
            nest(f"for s in T.unroll({TAPS + 1}):", f"all[(s * {parts} + ty) * {side} + tx] = sums[s]"),
            "acc[0] = T.float32(0)",
            nest(f"for i in range({parts}):", f"acc[0] = acc[0] + all[i * {side} + tx]"),
            f"acc[0] = {self.deviation}",
            nest(
                f"if {position} < {self.area} and ty == 0:",
                f"{statistic.replace('WHICH', '0')} = mean[0]",
                f"{statistic.replace('WHICH', '1')} = acc[0]",
            ),
            nest(
                f"if {position} < {self.area} and ty > 0 and ty <= {TAPS}:",
                "d[0] = T.float32(0)",
                share,
                f"{statistic.replace('WHICH', '1 + ty')} = d[0] * acc[0] + sal_b[ty - 1]",
            ),
        ]
        return Program(
            grid=(blocks(self.area, side), self.n),
            group=(side, parts),
            body="\n".join(body),
            private={"acc": 1, "mean": 1, "d": 1, "sums": TAPS + 1},
            shared={"part": side * parts, "all": (TAPS + 1) * side * parts},
        )


@dataclass(frozen=True)
class Sample(SAA, Kernel):
    NAME = "saa_sample"
    KNOBS = head.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        window = Buffer((self.window,))
        return {
            "x": self.image,
            "stats": self.statistics,
            "in_window": window,
            "ln_g": self.vector,
            "ln_b": self.vector,
        }

    @property
    def out(self) -> Buffer:
        return self.by_token

    def offered(self, limits: Limits) -> list[head.Tiling]:
        return head.groups(limits, least=self.window)  # a work-item for each position of a window

    def program(self, limits: Limits, tiling: head.Tiling) -> Program:
        memory, group, window, area = self.memory(limits), tiling.group, self.window, self.area
        (row, column), (each_row, each_column) = self.place("tx"), self.place("p")
        here, statistic = f"{row} * {self.w} + {column}", f"by * {STATISTICS} * {area}"
        inside = f"tx < {window} and {self.inside(row, column)}"
        there = f"{row} + dy >= 1 and {row} + dy <= {self.h} and {column} + dx >= 1 and {column} + dx <= {self.w}"
        neighbour = f"{statistic} + (2 + dy * 3 + dx) * {area} + {here} + (dy - 1) * {self.w} + dx - 1"
        channel = f"(i * {group} + tx)"
        element = memory.load("x", f"(by * {self.c} + {channel}) * {area} + {each_row} * {self.w} + {each_column}")
        token = f"(by * {self.tokens} + bx) * {self.c} + {channel}"
        neighbours = nest(f"if {there}:", f"acc[0] = acc[0] + stats[{neighbour}]")
        neighbours = nest("for dy in T.unroll(3):", nest("for dx in T.unroll(3):", neighbours))
        sampled = nest(
            f"if {self.inside(each_row, each_column)}:", f"acc[0] = acc[0] + share[p] * ({element} - means[p])"
        )
        body = [
            f"acc[0] = T.float32({NO_SHARE})",
            nest(f"if {inside}:", "acc[0] = in_window[tx]", neighbours),
            nest(f"if tx < {window}:", "salience[tx] = acc[0]"),
            "top[0] = salience[0]",
            nest(f"for p in range({window}):", "top[0] = T.max(top[0], salience[p])"),
            "total[0] = T.float32(0)",
            nest(f"for p in range({window}):", "total[0] = total[0] + T.exp(salience[p] - top[0])"),
            nest(f"if tx < {window}:", "share[tx] = T.float32(0)", "means[tx] = T.float32(0)"),
            nest(
                f"if {inside}:",
                f"share[tx] = T.exp(acc[0] - top[0]) / total[0] * stats[{statistic} + {area} + {here}]",
                f"means[tx] = stats[{statistic} + {here}]",
            ),
            nest(
                f"for i in range({blocks(self.c, group)}):",
                nest(
                    f"if {channel} < {self.c}:",
                    "acc[0] = T.float32(0)",
                    nest(f"for p in range({window}):", sampled),
                    memory.store("out", token, f"acc[0] * ln_g[{channel}] + ln_b[{channel}]"),
                ),
            ),
        ]
        return Program(
            grid=(self.tokens, self.n),
            group=(group,),
            body="\n".join(body),
            private={"acc": 1, "top": 1, "total": 1},
            shared={"salience": window, "share": window, "means": window},
        )


@dataclass(frozen=True)
class Normalise(SAA, Kernel):
    NAME = "saa_normalise"
    KNOBS = reduce.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": self.image, "ln_g": self.vector, "ln_b": self.vector}

    @property
    def out(self) -> Buffer:
        return self.by_token

    def offered(self, limits: Limits) -> list[reduce.Tiling]:
        return reduce.shares(self.area, limits)

    def program(self, limits: Limits, tiling: reduce.Tiling) -> Program:
        memory, side, parts = self.memory(limits), tiling.side, tiling.parts
        position, channel = f"(bx * {side} + tx)", f"(i * {parts} + ty)"
        element = memory.load("x", f"(by * {self.c} + {channel}) * {self.area} + {position}")
        token = f"(by * {self.tokens} + {position}) * {self.c} + {channel}"
        normalised = [
            f"d[0] = ({element} - mean[0]) * acc[0]",
            memory.store("out", token, f"d[0] * ln_g[{channel}] + ln_b[{channel}]"),
        ]
        body = [
            self.moments(memory, side, parts, 1),
            f"spread[ty * {side} + tx] = sums[0]",
            "acc[0] = T.float32(0)",
            nest(f"for i in range({parts}):", f"acc[0] = acc[0] + spread[i * {side} + tx]"),
            f"acc[0] = {self.deviation}",
            nest(
                f"if {position} < {self.area}:",
                nest(f"for i in range({blocks(self.c, parts)}):", nest(f"if {channel} < {self.c}:", *normalised)),
            ),
        ]
        return Program(
            grid=(blocks(self.area, side), self.n),
            group=(side, parts),
            body="\n".join(body),
            private={"acc": 1, "mean": 1, "d": 1, "sums": 1},
            shared={"part": side * parts, "spread": side * parts},
        )


@dataclass(frozen=True)
class Attend(SAA, Kernel):
    NAME = "saa_attend"
    KNOBS = head.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        c = self.c
        return {"tokens": self.by_token, "qkv_w": self.matrix(c, 3 * c), "qkv_b": Buffer((3 * c,))}

    @property
    def out(self) -> Buffer:
        return self.by_token

    def offered(self, limits: Limits) -> list[head.Tiling]:
        return head.groups(limits)

    def program(self, limits: Limits, tiling: head.Tiling) -> Program:
        memory, group = self.memory(limits), tiling.group
        tokens, c, dim, pair = self.tokens, self.c, self.dim, 2 * self.dim
        at = f"(i * {group} + tx)"
        column = f"({c} + {at} % {pair} // {dim} * {c} + by * {dim} + {at} % {dim})"
        token = memory.load("tokens", f"(bx * {tokens} + {at} // {pair}) * {c} + k")
        keys_and_values = nest(
            f"if {at} < {tokens * pair}:",
            f"acc[0] = qkv_b[{column}]",
            nest(
                f"for k in range({c}):",
                f"acc[0] = acc[0] + {token} * {memory.load('qkv_w', f'k * {3 * c} + {column}')}",
            ),
            f"pairs[{at}] = acc[0]",
        )
        body = [
            nest(f"for i in range({blocks(tokens * pair, group)}):", keys_and_values),
            nest(
                f"for i in range({blocks(tokens, group)}):",
                nest(f"if {at} < {tokens}:", *self._query(memory, at), *self._mix(memory, at)),
            ),
        ]
        return Program(
            grid=(self.n, self.heads),
            group=(group,),
            body="\n".join(body),
            private={"acc": 1, "top": 1, "total": 1, "q": dim, "mix": dim},
            shared={"pairs": tokens * pair},
        )

    def _query(self, memory: Memory, at: str) -> list[str]:
        c, dim = self.c, self.dim
        weight = memory.load("qkv_w", f"k * {3 * c} + by * {dim} + j")
        return [
            nest(f"for j in T.unroll({dim}):", f"q[j] = qkv_b[by * {dim} + j]", "mix[j] = T.float32(0)"),
            nest(
                f"for k in range({c}):",
                f"acc[0] = {memory.load('tokens', f'(bx * {self.tokens} + {at}) * {c} + k')}",
                nest(f"for j in T.unroll({dim}):", f"q[j] = q[j] + acc[0] * {weight}"),
            ),
        ]

    def _mix(self, memory: Memory, at: str) -> list[str]:
        """Scores are computed twice rather than kept: first for their maximum, then for their shares."""
        tokens, dim, pair = self.tokens, self.dim, 2 * self.dim
        score = [
            "acc[0] = T.float32(0)",
            nest(f"for j in T.unroll({dim}):", f"acc[0] = acc[0] + q[j] * pairs[t * {pair} + j]"),
        ]
        value = f"pairs[t * {pair} + {dim} + j]"
        mixed = f"(bx * {tokens} + {at}) * {self.c} + by * {dim} + j"
        return [
            "top[0] = T.float32(-3.0e38)",
            nest(f"for t in range({tokens}):", *score, "top[0] = T.max(top[0], acc[0])"),
            "total[0] = T.float32(0)",
            nest(
                f"for t in range({tokens}):",
                *score,
                "acc[0] = T.exp(acc[0] - top[0])",
                "total[0] = total[0] + acc[0]",
                nest(f"for j in T.unroll({dim}):", f"mix[j] = mix[j] + acc[0] * {value}"),
            ),
            nest(f"for j in T.unroll({dim}):", memory.store("out", mixed, "mix[j] / total[0]")),
        ]


@dataclass(frozen=True)
class Recover(SAA, Kernel):
    NAME = "saa_recover"
    KNOBS = head.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        found = {"x": self.image, "mixed": self.by_token, "pr_w": self.matrix(self.c, self.c), "pr_b": self.vector}
        if self.r > 1:
            found |= {"up_w": self.matrix(self.r, self.r, self.c), "up_b": self.vector}
        return found

    @property
    def out(self) -> Buffer:
        return self.image

    def offered(self, limits: Limits) -> list[head.Tiling]:
        return head.groups(limits)

    def program(self, limits: Limits, tiling: head.Tiling) -> Program:
        memory, group, c, window = self.memory(limits), tiling.group, self.c, self.window
        at = f"(i * {group} + tx)"
        channel, p = f"({at} // {window})", f"({at} % {window})"
        row, column = self.place(p)
        image = f"(by * {c} + {channel}) * {self.area} + {row} * {self.w} + {column}"
        spread = f"whole[{channel}]"
        if self.r > 1:
            spread = f"{spread} * {memory.load('up_w', f'{p} * {c} + {channel}')} + up_b[{channel}]"
        mixed = memory.load("mixed", f"(by * {self.tokens} + bx) * {c} + {at}")
        product = f"acc[0] = acc[0] + row[k] * {memory.load('pr_w', f'k * {c} + {at}')}"
        body = [
            nest(f"for i in range({blocks(c, group)}):", nest(f"if {at} < {c}:", f"row[{at}] = {mixed}")),
            nest(
                f"for i in range({blocks(c, group)}):",
                nest(
                    f"if {at} < {c}:",
                    f"acc[0] = pr_b[{at}]",
                    nest(f"for k in range({c}):", product),
                    f"whole[{at}] = acc[0]",
                ),
            ),
            nest(
                f"for i in range({blocks(c * window, group)}):",
                nest(
                    f"if {at} < {c * window} and {self.inside(row, column)}:",
                    memory.store("out", image, f"{memory.load('x', image)} + {spread}"),
                ),
            ),
        ]
        return Program(
            grid=(self.tokens, self.n),
            group=(group,),
            body="\n".join(body),
            private={"acc": 1},
            shared={"row": c, "whole": c},
        )


def saa(shape: SAA, scale: float, weights: dict[str, np.ndarray]) -> Lowered | None:
    """The launches of the region, and its constants; None where heads do not divide the channels."""
    if shape.c % shape.heads:
        return None
    told = asdict(shape)
    attend = Launch(Attend(**told), ("tokens", "qkv_w", "qkv_b"), "mixed")
    recover = Launch(Recover(**told), tuple(Recover(**told).reads), "out")
    if shape.r == 1:
        first = [Launch(Normalise(**told), ("x", "ln_g", "ln_b"), "tokens")]
    else:
        measure = Launch(Measure(**told), ("x", "sal_w", "sal_b"), "stats")
        first = [measure, Launch(Sample(**told), tuple(Sample(**told).reads), "tokens")]
    return Lowered([*first, attend, recover], _constants(shape, scale, weights))


def _constants(shape: SAA, scale: float, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The affine part of the layer norm goes into the saliency, the scale of the scores into the query."""
    found = {name: weights[name] for name in ("ln_g", "ln_b", "pr_w", "pr_b")}
    scales = np.ones(3 * shape.c, "float32")
    scales[: shape.c] = scale
    found["qkv_w"], found["qkv_b"] = weights["qkv_w"] * scales, weights["qkv_b"] * scales
    if shape.r > 1:
        taps = weights["sal_w"].reshape(TAPS, shape.c).astype("float64")
        found["sal_w"] = taps * weights["ln_g"]
        found["sal_b"] = taps @ weights["ln_b"].astype("float64")
        found["in_window"] = np.broadcast_to(weights["sal_b"], (shape.r, shape.r)).reshape(-1)
        found["up_w"], found["up_b"] = weights["up_w"], weights["up_b"]
    return found
