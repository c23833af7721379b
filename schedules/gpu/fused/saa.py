"""SAA for few images, where launches are what takes time: three, or two where every position is a token.

* sample: a work-group a few windows beside each other; mean and spread of their positions and of those around, the
  softmax of their saliency, their tokens
* attend: a work-group a head; keys and values of all tokens stay in its local memory, scores in registers
* recover: a work-group a token; projection, spread over its window, residual

At rate 1, `attend` normalises its tokens by itself: every head anew, which is less than to launch a kernel for it.
Everything is computed in float32, whatever is stored: means, exponentials and long sums are where float16 would lose
what matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from schedules.gpu.launch import Buffer, Kernel, Limits, Memory, Program, blocks, nest
from schedules.gpu.primitives import head
from schedules.saa_shape import NO_SHARE, TAPS, SAAShape

WORK_GROUPS = 16  # as many as the largest of mobile GPUs has cores
SHARES = 4  # of a token's channels, where attention normalises


@dataclass(frozen=True)
class SAA(SAAShape):
    """What all of its kernels need to know."""

    dtype: str = "float32"

    @property
    def area(self) -> int:
        return self.h * self.w

    @property
    def window(self) -> int:
        return self.r**2

    @property
    def image(self) -> Buffer:
        return Buffer((self.n, self.c, self.h, self.w), self.dtype)

    @property
    def tokens_first(self) -> Buffer:
        """By token, as the projection wants them."""
        return Buffer((self.n, self.tokens, self.c), self.dtype)

    @property
    def channels_first(self) -> Buffer:
        """By channel, as an image is stored: neighbouring work-items have neighbouring tokens."""
        return Buffer((self.n, self.c, self.tokens), self.dtype)

    def matrix(self, *extents: int) -> Buffer:
        return Buffer(extents, self.dtype)

    @property
    def vector(self) -> Buffer:
        return Buffer((self.c,))


@dataclass(frozen=True)
class Items:
    """The work-items of a group, which take turns at what there is to do; `at` is what one of them does."""

    group: int

    @property
    def at(self) -> str:
        return f"(i * {self.group} + tx)"

    def each(self, count: int, *statements: str) -> str:
        turns = nest(f"if {self.at} < {count}:", *statements)
        return nest(f"for i in range({blocks(count, self.group)}):", turns)


@dataclass(frozen=True)
class Moments:
    """Mean and spread of some positions, the latter in two passes because squares cancel.

    `parts` work-items share the channels of a position, and meet in local memory.
    """

    shape: SAA
    items: Items
    positions: int
    parts: int
    sums: int = 1  # in the second pass: of squares, and others

    @property
    def position(self) -> str:
        return f"({self.items.at} % {self.positions})"

    @property
    def channel(self) -> str:
        return f"(k * {self.parts} + {self.items.at} // {self.positions})"

    @property
    def private(self) -> dict[str, int]:
        return {"acc": 1, "mean": 1, "d": 1, "sums": self.sums}

    @property
    def shared(self) -> dict[str, int]:
        each, parts = self.positions, self.positions * self.parts
        return {"first": parts, "second": self.sums * parts, "means": each, "scales": each}

    def total(self, into: str, part: str) -> str:
        return nest(
            f"for p in range({self.parts}):", f"{into} = {into} + {part}[p * {self.positions} + {self.position}]"
        )

    def statements(self, element: str, *others: str, inside: str = "") -> list[str]:
        """Leaves `means` and `scales`, 1 / deviation; `others` see d = x - mean of a channel and add to sums[1:]."""
        c, eps, parts = self.shape.c, self.shape.eps, self.positions * self.parts

        def over_channels(*statements: str) -> str:
            here = nest(f"if {self.channel} < {c}:", *statements)
            loop = nest(f"for k in range({blocks(c, self.parts)}):", here)
            return nest(f"if {inside}:", loop) if inside else loop

        mean = ["mean[0] = T.float32(0)", self.total("mean[0]", "first"), f"mean[0] = mean[0] * T.float32({1 / c!r})"]
        first = ["acc[0] = T.float32(0)", over_channels(f"acc[0] = acc[0] + {element}")]
        second = [
            nest(f"for s in T.unroll({self.sums}):", "sums[s] = T.float32(0)"),
            over_channels(f"d[0] = {element} - mean[0]", "sums[0] = sums[0] + d[0] * d[0]", *others),
            nest(f"for s in T.unroll({self.sums}):", f"second[s * {parts} + {self.items.at}] = sums[s]"),
        ]
        spread = ["acc[0] = T.float32(0)", self.total("acc[0]", "second")]
        scale = f"T.rsqrt(acc[0] * T.float32({1 / c!r}) + T.float32({eps!r}))"
        return [
            self.items.each(parts, *first, f"first[{self.items.at}] = acc[0]"),
            self.items.each(parts, *mean, *second),
            self.items.each(
                self.positions,
                *mean,
                *spread,
                f"means[{self.items.at}] = mean[0]",
                f"scales[{self.items.at}] = {scale}",
            ),
        ]


@dataclass(frozen=True)
class Strip:
    """Work-groups of `group` work-items for `wide` windows beside each other, `parts` work-items a position."""

    wide: int
    group: int
    parts: int


@dataclass(frozen=True)
class Sample(SAA, Kernel):
    """Tokens without the affine part of the layer norm, which is in the weights of what reads them."""

    NAME = "saa_sample"
    KNOBS = Strip

    @property
    def reads(self) -> dict[str, Buffer]:
        taps = {"sal_w": Buffer((TAPS, self.c)), "sal_b": Buffer((TAPS,)), "in_window": Buffer((self.window,))}
        return {"x": self.image, **taps}

    @property
    def out(self) -> Buffer:
        return self.channels_first

    def place(self, channel: str, token: str) -> str:
        """Where a channel of one of the image's tokens goes."""
        return f"(by * {self.c} + {channel}) * {self.tokens} + {token}"

    def positions(self, wide: int) -> int:
        """Those of a strip and those around it."""
        return (self.r + 2) * (wide * self.r + 2)

    def offered(self, limits: Limits) -> list[Strip]:
        # What lies between two windows of a strip is computed once. But every core wants a work-group of its own, and
        # where local memory is main memory, work-items should not have to share a position.
        def suits(wide: int) -> bool:
            groups = self.n * self.rows * blocks(self.columns, wide)
            return groups >= WORK_GROUPS and self.positions(wide) <= limits.wave

        wide = max(filter(suits, range(1, self.columns + 1)), default=1)
        parts = max(1, min(2 * limits.wave // self.positions(wide), self.c))
        waves = min(blocks(parts * self.positions(wide), limits.wave), 4)
        found = [Strip(wide, waves * limits.wave, parts)]
        wides = [size for size in (1, 2, 3, 4, 8) if size <= self.columns]
        return found + [Strip(*knobs) for knobs in product(wides, (64, 128, 256), (1, 2, 4, 8, 16))]

    def program(self, limits: Limits, tiling: Strip) -> Program:
        items, place = Items(tiling.group), _Place(self, tiling.wide)
        positions, memory, entries = self.positions(tiling.wide), self.memory(limits), tiling.wide * self.window
        moments = Moments(self, items, positions, tiling.parts, sums=1 + TAPS)
        row, column = place.around(moments.position)
        element = memory.load("x", place.element(moments.channel, row, column))
        tap = f"sums[1 + s] = sums[1 + s] + d[0] * sal_w[s * {self.c} + {moments.channel}]"
        taps = nest(f"for s in T.unroll({TAPS}):", tap)
        body = [
            *moments.statements(element, taps, inside=place.inside(row, column)),
            *self._shares(items, place, tiling.parts),
            items.each(self.c * tiling.wide, *self._token(memory, items, place)),
        ]
        return Program(
            grid=(self.rows * place.strips, self.n),
            group=(tiling.group,),
            body="\n".join(body),
            private={**moments.private, "total": 1},
            shared={**moments.shared, "salience": entries, "powers": entries},
        )

    def _shares(self, items: Items, place: _Place, parts: int) -> list[str]:
        """The saliency of the windows' positions, from their neighbours' shares; then their powers in the softmax."""
        entries, positions = place.wide * self.window, self.positions(place.wide)
        window, p = f"({items.at} // {self.window})", f"({items.at} % {self.window})"
        row, column = place.within(window, p)
        here, there = place.index(row, column), place.index(f"({row} + dy - 1)", f"({column} + dx - 1)")
        share = f"second[((1 + dy * 3 + dx) * {parts} + q) * {positions} + {there}]"
        neighbour = nest(
            f"if {place.inside(*place.around(there))}:",
            "d[0] = T.float32(0)",
            nest(f"for q in range({parts}):", f"d[0] = d[0] + {share}"),
            f"acc[0] = acc[0] + d[0] * scales[{there}] + sal_b[dy * 3 + dx]",
        )
        neighbours = nest("for dy in T.unroll(3):", nest("for dx in T.unroll(3):", neighbour))
        return [
            items.each(
                entries,
                f"acc[0] = T.float32({NO_SHARE})",
                nest(f"if {place.inside(*place.around(here))}:", f"acc[0] = in_window[{p}]", neighbours),
                f"salience[{items.at}] = acc[0]",
            ),
            items.each(
                entries,
                f"acc[0] = salience[{window} * {self.window}]",
                nest(
                    f"for p in range({self.window}):",
                    f"acc[0] = T.max(acc[0], salience[{window} * {self.window} + p])",
                ),
                f"powers[{items.at}] = T.exp(salience[{items.at}] - acc[0])",
            ),
        ]

    def _token(self, memory: Memory, items: Items, place: _Place) -> list[str]:
        """One channel of one token; neighbouring work-items have neighbouring windows."""
        window, channel = f"({items.at} % {place.wide})", f"({items.at} // {place.wide})"
        here = place.index(*place.within(window, "p"))
        row, column = place.around(here)
        power = f"powers[{window} * {self.window} + p]"
        normal = f"({memory.load('x', place.element(channel, row, column))} - means[{here}]) * scales[{here}]"
        sums = [f"total[0] = total[0] + {power}", f"acc[0] = acc[0] + {power} * {normal}"]
        token = self.place(channel, f"{place.row} * {self.columns} + {place.first} + {window}")
        return [
            "acc[0] = T.float32(0)",
            "total[0] = T.float32(0)",
            nest(f"for p in range({self.window}):", nest(f"if {place.inside(row, column)}:", *sums)),
            nest(f"if {place.first} + {window} < {self.columns}:", memory.store("out", token, "acc[0] / total[0]")),
        ]


@dataclass(frozen=True)
class _Place:
    """Where things are in the strip of `wide` windows that is work-group bx, with a margin of one around it.

    Rows and columns count from that margin, of the strip as of the image.
    """

    shape: SAA
    wide: int

    @property
    def strips(self) -> int:
        """Of a row of windows."""
        return blocks(self.shape.columns, self.wide)

    @property
    def row(self) -> str:
        """Of windows."""
        return f"(bx // {self.strips})"

    @property
    def first(self) -> str:
        """The column of the first window."""
        return f"(bx % {self.strips} * {self.wide})"

    @property
    def breadth(self) -> int:
        return self.wide * self.shape.r + 2

    def index(self, row: str, column: str) -> str:
        return f"({row} * {self.breadth} + {column})"

    def within(self, window: str, p: str) -> tuple[str, str]:
        """Row and column, in the strip, of position p of a window."""
        r = self.shape.r
        return f"({p} // {r} + 1)", f"({window} * {r} + {p} % {r} + 1)"

    def around(self, position: str) -> tuple[str, str]:
        """Row and column, in the image, of a position of the strip."""
        r, breadth = self.shape.r, self.breadth
        return f"({self.row} * {r} + {position} // {breadth})", f"({self.first} * {r} + {position} % {breadth})"

    def inside(self, row: str, column: str) -> str:
        return f"{row} >= 1 and {row} <= {self.shape.h} and {column} >= 1 and {column} <= {self.shape.w}"

    def element(self, channel: str, row: str, column: str) -> str:
        plane = f"(by * {self.shape.c} + {channel}) * {self.shape.area}"
        return f"{plane} + ({row} - 1) * {self.shape.w} + {column} - 1"


def mixed(shape: SAA, pair: int, stored: str) -> list[str]:
    """What a head makes of the query in q: `stored` puts mix[j] / total[0] away.

    Key and value of a token are beside each other in `pairs`, `pair` numbers from one token to the next. Scores are
    computed twice rather than kept: first for their maximum, then for their shares.
    """
    tokens, dim = shape.tokens, shape.dim
    score = [
        "acc[0] = T.float32(0)",
        nest(f"for j in T.unroll({dim}):", f"acc[0] = acc[0] + q[j] * pairs[t * {pair} + j]"),
    ]
    value = f"pairs[t * {pair} + {dim} + j]"
    return [
        "top[0] = T.float32(-3.0e38)",
        nest(f"for t in range({tokens}):", *score, "top[0] = T.max(top[0], acc[0])"),
        "total[0] = T.float32(0)",
        nest(f"for j in T.unroll({dim}):", "mix[j] = T.float32(0)"),
        nest(
            f"for t in range({tokens}):",
            *score,
            "acc[0] = T.exp(acc[0] - top[0])",
            "total[0] = total[0] + acc[0]",
            nest(f"for j in T.unroll({dim}):", f"mix[j] = mix[j] + acc[0] * {value}"),
        ),
        nest(f"for j in T.unroll({dim}):", stored),
    ]


@dataclass(frozen=True)
class Attend(SAA, Kernel):
    NAME = "saa_attend"
    KNOBS = head.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        c, tokens = self.c, self.image if self.r == 1 else self.channels_first
        return {"x": tokens, "qkv_w": self.matrix(c, 3 * c), "qkv_b": Buffer((3 * c,))}

    @property
    def out(self) -> Buffer:
        return self.tokens_first

    def offered(self, limits: Limits) -> list[head.Tiling]:
        return head.groups(limits)

    @property
    def lanes(self) -> int:
        """How many weights to load at once."""
        return next(size for size in (4, 2, 1) if self.dim % size == 0)

    def program(self, limits: Limits, tiling: head.Tiling) -> Program:
        memory, items = self.memory(limits), Items(tiling.group)
        tokens, dim, pair = self.tokens, self.dim, 2 * self.dim
        private = {"acc": 1, "top": 1, "total": 1, "weight": self.lanes, "q": dim, "mix": dim}
        shared, body = {"pairs": tokens * pair}, []
        if self.r == 1:
            moments = Moments(self, items, tokens, SHARES)
            body += moments.statements(self._element(memory, moments.position, moments.channel))
            private, shared = moments.private | private, moments.shared | shared
        token, third = f"({items.at} % {tokens})", f"({items.at} // {tokens})"
        kept = f"pairs[{token} * {pair} + {third} * {dim} + j] = q[j]"
        stored = memory.store("out", f"(bx * {tokens} + {items.at}) * {self.c} + by * {dim} + j", "mix[j] / total[0]")
        body += [
            items.each(
                2 * tokens,
                *self._projected(memory, token, f"(1 + {third})"),
                nest(f"for j in T.unroll({dim}):", kept),
            ),
            items.each(tokens, *self._projected(memory, items.at, "0"), *mixed(self, pair, stored)),
        ]
        return Program(
            grid=(self.n, self.heads), group=(tiling.group,), body="\n".join(body), private=private, shared=shared
        )

    def _element(self, memory: Memory, token: str, channel: str) -> str:
        return memory.load("x", f"(bx * {self.c} + {channel}) * {self.tokens} + {token}")

    def _projected(self, memory: Memory, token: str, third: str) -> list[str]:
        """A token's query (third 0), key (1) or value (2) for this head, in q."""
        c, dim, lanes = self.c, self.dim, self.lanes
        first = f"{third} * {c} + by * {dim}"
        normal = self.r == 1
        value = self._element(memory, token, "k") + (f" - means[{token}]" if normal else "")
        product = f"q[g * {lanes} + v] = q[g * {lanes} + v] + acc[0] * weight[v]"
        products = nest(
            f"for g in T.unroll({dim // lanes}):",
            memory.load_lanes("weight", "0", "qkv_w", f"k * {3 * c} + {first} + g * {lanes}", lanes),
            nest(f"for v in T.unroll({lanes}):", product),
        )
        total = f"q[j] * scales[{token}]" if normal else "q[j]"
        return [
            nest(f"for j in T.unroll({dim}):", "q[j] = T.float32(0)"),
            nest(f"for k in range({c}):", f"acc[0] = {value}", products),
            nest(f"for j in T.unroll({dim}):", f"q[j] = {total} + qkv_b[{first} + j]"),
        ]


@dataclass(frozen=True)
class Recover(SAA, Kernel):
    NAME = "saa_recover"
    KNOBS = head.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        found = {"x": self.image, "mixed": self.tokens_first, "pr_w": self.matrix(self.c, self.c), "pr_b": self.vector}
        if self.r > 1:
            found |= {"up_w": self.matrix(self.r, self.r, self.c), "up_b": self.vector}
        return found

    @property
    def out(self) -> Buffer:
        return self.image

    def offered(self, limits: Limits) -> list[head.Tiling]:
        return head.groups(limits)

    def program(self, limits: Limits, tiling: head.Tiling) -> Program:
        memory, items, c, window = self.memory(limits), Items(tiling.group), self.c, self.window
        channel, p = f"({items.at} // {window})", f"({items.at} % {window})"
        row = f"(bx // {self.columns} * {self.r} + {p} // {self.r})"
        column = f"(bx % {self.columns} * {self.r} + {p} % {self.r})"
        image = f"(by * {c} + {channel}) * {self.area} + {row} * {self.w} + {column}"
        spread = f"whole[{channel}]"
        if self.r > 1:
            spread = f"{spread} * {memory.load('up_w', f'{p} * {c} + {channel}')} + up_b[{channel}]"
        mixed = memory.load("mixed", f"(by * {self.tokens} + bx) * {c} + {items.at}")
        product = f"acc[0] = acc[0] + row[k] * {memory.load('pr_w', f'k * {c} + {items.at}')}"
        recovered = memory.store("out", image, f"{memory.load('x', image)} + {spread}")
        body = [
            items.each(c, f"row[{items.at}] = {mixed}"),
            items.each(
                c,
                f"acc[0] = pr_b[{items.at}]",
                nest(f"for k in range({c}):", product),
                f"whole[{items.at}] = acc[0]",
            ),
            items.each(c * window, nest(f"if {row} < {self.h} and {column} < {self.w}:", recovered)),
        ]
        return Program(
            grid=(self.tokens, self.n),
            group=(tiling.group,),
            body="\n".join(body),
            private={"acc": 1},
            shared={"row": c, "whole": c},
        )
