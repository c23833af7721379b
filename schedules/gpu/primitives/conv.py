"""Convolutions as products of matrices: every work-item keeps a tile of channels by positions in registers.

An epilogue and a rank-one term ride along, so nothing is written that the next kernel would only add to.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from schedules.dtypes import stored_as
from schedules.gpu.epilogue import BIAS, Results, epilogue_reads, gelu, split
from schedules.gpu.launch import BARRIER, TEXEL, Buffer, Kernel, Limits, Memory, Program, blocks, nest
from schedules.gpu.primitives.matrix import Matrix
from schedules.gpu.primitives.windows import Spans
from schedules.spec import Epilogue

POSITIONS = 16  # work-items side by side along the positions, by default
HALF_TERMS = 8  # products that float16 may sum up before float32 takes over


@dataclass(frozen=True)
class Tiling:
    """`lanes` positions by `channels` a work-item, in work-groups of `columns` by `rows`.

    Weights come through an `image`, or a work-group brings those of `staged` input channels at a time into local
    memory; with both 0 every work-item loads what it needs.
    """

    lanes: int
    channels: int
    columns: int
    rows: int
    staged: int
    image: int


@dataclass(frozen=True)
class Convolution(Spans, Kernel):
    """out = epilogue(w * x - by_position (n, 1, h, w) * by_channel (k)), the latter with `rank_one`.

    A bias that comes first is added before the rank-one term. With `common`, by_position is no buffer but
    gelu(dec_w . x + dec_b), summed up on the way by all who read x.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # above, left, below, right
    dilation: tuple[int, int] = (1, 1)
    epilogue: Epilogue = BIAS
    rank_one: bool = False
    dtype: str = "float32"  # of the arithmetic
    given: str = "float32"  # how x is stored
    common: bool = False
    groups: int = 1

    @property
    def within(self) -> int:
        """Input channels of a group."""
        return self.c // self.groups

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def pointwise(self) -> bool:
        return self.taps == 1 and self.strides == (1, 1) and not any(self.padding)

    @property
    def reads(self) -> dict[str, Buffer]:
        found = {
            "x": Buffer((self.n, self.c, self.h, self.w), self.given),
            "w": Buffer((*(self.kernel if self.taps > 1 else ()), self.within, self.k), stored_as(self.dtype)),
        }
        finish = epilogue_reads(self.epilogue, self.out, self.k, self.n)
        if "b" in finish:
            found["b"] = finish.pop("b")
        if self.common:
            found |= {"dec_w": Buffer((self.c,)), "dec_b": Buffer((1,))}
        elif self.rank_one:
            found["by_position"] = Buffer((self.n, 1, self.height, self.width))
        if self.rank_one:
            found["by_channel"] = Buffer((self.k,))
        return found | finish

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, self.k, self.height, self.width), stored_as(self.dtype))


@dataclass(frozen=True)
class Conv(Convolution):
    """One that any GPU can run."""

    NAME = "conv"
    KNOBS = Tiling

    def offered(self, limits: Limits) -> list[Tiling]:
        # Loads of four numbers are the widest everywhere.
        lanes = [size for size in (4, 2, 1) if size == 1 or (self.pointwise and self.positions % size == 0)]
        # A work-item's are of one group.
        channels = [size for size in (8, 4, 2, 1) if self.k // self.groups % size == 0]
        # Through local memory only where that is not main memory by another name, as on Mali.
        staged = [size for size in (8, 4) if self.within % size == 0] if limits.local_is_fast else []
        # Tiles of 8 channels are half the loads of tiles of 4, but with them a Mali's 64 registers are full.
        preferred = 8 if limits.registers_per_item > 64 else 4
        channel = next(size for size in channels if size <= preferred)
        imaged = self.k % TEXEL == 0 and self.reads["w"].size <= limits.texels * TEXEL
        # The cache of texture units pays where many work-groups read the same weights. A single one would read each
        # of them once, and then local memory is the better place to share it.
        reread = self.n * blocks(blocks(self.positions, lanes[0]), POSITIONS) > 1
        found = [
            Tiling(
                lanes=lanes[0],
                channels=channel,
                columns=POSITIONS,
                rows=limits.wave // POSITIONS,
                staged=0 if (imaged and reread) or not staged else staged[0],
                image=int(imaged and reread),
            )
        ]
        ways = [(0, 0), *((size, 0) for size in staged), *([(0, 1)] if imaged else [])]
        for lane, channel, columns, group, (stage, image) in product(
            lanes, channels, (8, 16, 32), (32, 64, 128, 256), ways
        ):
            if not image or channel % TEXEL == 0:
                found.append(Tiling(lane, channel, columns, group // columns, stage, image))
        return found

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        lanes, channels = tiling.lanes, tiling.channels
        columns, rows = blocks(self.positions, lanes), self.k // channels
        body = _Body(self, tiling, self.memory(limits), halves=self.dtype == "float16" and limits.half)
        factors = {"xs": lanes, "ws": channels} | ({"part": lanes * channels} if body.halves else {})
        sums = {"acc": lanes * channels, "more": lanes} | ({"dot": lanes} if self.common else {})
        return Program(
            grid=(blocks(columns, tiling.columns), blocks(rows, tiling.rows), self.n),
            group=(tiling.columns, tiling.rows),
            body=body.text(f"{body.column} < {columns} and {body.matrix.column} < {rows}"),
            private=sums if body.halves else sums | factors,
            halves=factors if body.halves else {},
            shared={"near": tiling.staged * body.matrix.width} if tiling.staged else {},
        )


@dataclass(frozen=True)
class _Body:
    """The statements of one convolution under one tiling; with `halves`, products are summed up in float16 at first."""

    conv: Conv
    tiling: Tiling
    memory: Memory
    halves: bool

    @property
    def column(self) -> str:
        return f"bx * {self.tiling.columns} + tx"

    @property
    def position(self) -> str:
        return f"({self.column}) * {self.tiling.lanes}"

    @property
    def matrix(self) -> Matrix:
        tiling = self.tiling
        return Matrix(
            memory=self.memory,
            k=self.conv.k,
            channels=tiling.channels,
            group="by",
            item="ty",
            items=tiling.rows,
            number=f"ty * {tiling.columns} + tx",
            size=tiling.columns * tiling.rows,
            staged=tiling.staged,
            image=tiling.image,
            factor=self.factor,
        )

    @property
    def factor(self) -> str:
        return "float16" if self.halves else "float32"

    def text(self, inside: str) -> str:
        conv = self.conv
        (high, wide), tap = conv.kernel, "0" if conv.taps == 1 else f"(dy * {conv.kernel[1]} + dx)"
        loops = self.products(tap, inside)
        if conv.taps > 1:
            loops = nest(f"for dy in range({high}):", nest(f"for dx in range({wide}):", loops))
        if not self.tiling.staged:
            loops = nest(f"if {inside}:", loops)
        cleared = [self.each_sum("acc[s] = T.float32(0)")]
        if conv.common:
            cleared.append(self.each_lane("dot[v] = T.float32(0)"))
        return "\n".join([*cleared, loops, nest(f"if {inside}:", self.epilogue())])

    def each_sum(self, statement: str) -> str:
        return nest(f"for s in T.unroll({self.tiling.lanes * self.tiling.channels}):", statement)

    def each_lane(self, *statements: str) -> str:
        return nest(f"for v in T.vectorized({self.tiling.lanes}):", *statements)

    def each_channel(self, *statements: str) -> str:
        return nest(f"for j in T.unroll({self.tiling.channels}):", *statements)

    def products(self, tap: str, inside: str) -> str:
        """acc += w * x for one tap of the kernel, some input channels at a time."""
        chunk = self.tiling.staged or (self.chunk if self.halves else 1)
        channel = f"(io * {chunk} + ii)"
        into, lanes = "part" if self.halves else "acc", self.tiling.lanes
        at = f"{into}[j * {lanes} + v]"
        terms = [
            *self.inputs(channel),
            self.matrix.load(f"({tap} * {self.conv.within} + {channel})", "ii"),
            self.each_channel(self.each_lane(f"{at} = {at} + ws[j] * xs[v]")),
        ]
        if self.conv.common:
            number = 'T.Cast("float32", xs[v])' if self.halves else "xs[v]"
            terms.append(self.each_lane(f"dot[v] = dot[v] + dec_w[{channel}] * {number}"))
        steps = [nest(f"for ii in range({chunk}):", *terms)]
        if self.halves:
            cleared, added = "part[s] = T.float16(0)", 'acc[s] = acc[s] + T.Cast("float32", part[s])'
            steps = [self.each_sum(cleared), *steps, self.each_sum(added)]
        if self.tiling.staged:
            # All work-items of a group bring weights, also those that have nothing to compute. The barrier before the
            # next ones stands here: where a loop ends with a branch, PoCL (3.1) loses what was written before it.
            staging = self.matrix.staging(f"{tap} * {self.conv.within} + io * {chunk}")
            steps = [staging, nest(f"if {inside}:", *steps), BARRIER]
        return nest(f"for io in range({self.conv.within // chunk}):", *steps)

    @property
    def chunk(self) -> int:
        return next(size for size in range(HALF_TERMS, 0, -1) if self.conv.within % size == 0)

    def inputs(self, channel: str) -> list[str]:
        conv = self.conv
        group = f"({self.matrix.channel}) // {conv.k // conv.groups} * {conv.within} + " if conv.groups > 1 else ""
        plane = f"(bz * {conv.c} + {group}{channel}) * {conv.h * conv.w}"
        if conv.pointwise:
            index = f"{plane} + {self.position}"
            return [self.memory.load_lanes("xs", "0", "x", index, self.tiling.lanes, self.factor)]
        dy, dx = ("dy", "dx") if conv.taps > 1 else ("0", "0")
        (down, across), (above, left, _, _) = conv.strides, conv.padding
        row = f"(({self.column}) // {conv.width} * {down} + {dy} * {conv.dilation[0]} - {above})"
        column = f"(({self.column}) % {conv.width} * {across} + {dx} * {conv.dilation[1]} - {left})"
        inside = f"{row} >= 0 and {row} < {conv.h} and {column} >= 0 and {column} < {conv.w}"
        found = self.memory.load("x", f"{plane} + {row} * {conv.w} + {column}", self.factor)
        return [f"xs[0] = T.{self.factor}(0)", nest(f"if {inside}:", f"xs[0] = {found}")]

    def epilogue(self) -> str:
        """The rank-one term and the epilogue, and away with the results."""
        conv, lanes, channel = self.conv, self.tiling.lanes, self.matrix.channel
        biased, steps, joining = split(conv.epilogue)
        at = f"acc[j * {lanes} + v]"
        target = f"(bz * {conv.k} + {channel} + j) * {conv.positions} + {self.position}"
        results = Results(self.memory, lanes, at, f"{channel} + j", target, f"bz * {conv.k} + {channel} + j")
        value = f"{at} + {results.bias}" if biased else at
        found = []
        if conv.common:
            found.append(self.each_lane("dot[v] = dot[v] + dec_b[0]"))
            found.append(self.each_lane(f"more[v] = {gelu('dot[v]')}"))
        elif conv.rank_one:
            position = f"bz * {conv.positions} + {self.position}"
            found.append(self.memory.load_lanes("more", "0", "by_position", position, lanes))
        if conv.rank_one:
            value += f" - more[v] * by_channel[{channel} + j]"
        if value != at:
            found.append(self.each_channel(self.each_lane(f"{at} = {value}")))
        # What needs no other tensor is done for the whole tile at once.
        found += map(self.each_channel, results.through(steps))
        stored = self.memory.store_lanes("out", target, "acc", f"j * {lanes}", lanes)
        return "\n".join([*found, self.each_channel(*results.through(joining), stored)])
