"""A linear layer over row-major tokens: every work-item keeps a tile of tokens by output channels in registers.

The matrix is a weight, or every item of a batch has one of its own that is none: a product of two values. Neighbouring
work-items have neighbouring output channels, as weights and results lie in memory; all of them read the same numbers of
the input, several terms of a token in one load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from schedules.dtypes import stored_as
from schedules.gpu.epilogue import BIAS, Results, epilogue_reads, split
from schedules.gpu.launch import TEXEL, Buffer, Kernel, Limits, Memory, Program, blocks, nest
from schedules.gpu.primitives.conv import HALF_TERMS
from schedules.gpu.primitives.matrix import Matrix
from schedules.spec import Epilogue

COLUMNS = 16  # work-items side by side along the output channels, by default


@dataclass(frozen=True)
class Tiling:
    """`tokens` by `channels` results a work-item, in work-groups of `columns` (channels) by `rows` (tokens).

    Weights come through an `image`, or `staged` terms of them at a time through local memory; else as they are needed.
    """

    tokens: int
    channels: int
    columns: int
    rows: int
    staged: int
    image: int


@dataclass(frozen=True)
class Layer(Kernel):
    """out = epilogue(x @ w) for tokens of any leading extents; `own` where all but the last have a matrix each."""

    tokens: tuple[int, ...]
    c: int
    k: int
    epilogue: Epilogue = BIAS
    dtype: str = "float32"  # of the arithmetic
    given: str = "float32"  # how x is stored
    own: bool = False

    @property
    def items(self) -> tuple[int, ...]:
        """The extents of the batch."""
        return self.tokens[:-1] if self.own else ()

    @property
    def count(self) -> int:
        """Of tokens that one matrix is for."""
        return self.tokens[-1] if self.own else math.prod(self.tokens)

    def within(self, place: str, size: int) -> str:
        """A place in all items of the batch, of which each has a size."""
        return f"(bz * {size} + {place})" if self.own else place

    @property
    def reads(self) -> dict[str, Buffer]:
        matrix = Buffer((*self.items, self.c, self.k), stored_as(self.dtype))
        found = {"x": Buffer((*self.tokens, self.c), self.given), "w": matrix}
        return {**found, **epilogue_reads(self.epilogue, self.out, self.k)}

    @property
    def out(self) -> Buffer:
        """Products of two values stay wide: without a softmax they grow with the tokens, and are divided."""
        return Buffer((*self.tokens, self.k), "float32" if self.own else stored_as(self.dtype))


@dataclass(frozen=True)
class Linear(Layer):
    """One that any GPU can run."""

    NAME = "linear"
    KNOBS = Tiling

    @property
    def terms(self) -> int:
        """Of a token, that are loaded together."""
        return next(size for size in (4, 2, 1) if self.c % size == 0)

    def offered(self, limits: Limits) -> list[Tiling]:
        tokens = [size for size in (8, 4, 2, 1) if size < 2 * self.count][:3]
        channels = [size for size in (8, 4, 2, 1) if self.k % size == 0][:2]
        # Through local memory only where that is not main memory by another name; through images as convolutions do.
        staged = [size for size in (16, 8) if self.c % size == 0][:1] if limits.local_is_fast else []
        imaged = not self.own and self.k % TEXEL == 0 and self.reads["w"].size <= limits.texels * TEXEL
        token, channel = (next(size for size in sizes if size <= 4) for sizes in (tokens, channels))
        way = (0, 1) if imaged else (staged[0] if staged else 0, 0)
        ways = [(0, 0), *((size, 0) for size in staged), *([(0, 1)] if imaged else [])]
        found = [Tiling(token, channel, COLUMNS, limits.wave // COLUMNS, *way)]
        for token, channel, columns, group, (stage, image) in product(
            tokens, channels, (8, 16, 32), (64, 128, 256), ways
        ):
            if not image or channel % TEXEL == 0:
                found.append(Tiling(token, channel, columns, group // columns, stage, image))
        return found

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        body = _Body(self, tiling, self.memory(limits), halves=self.dtype == "float16" and limits.half)
        columns, rows = self.k // tiling.channels, blocks(self.count, tiling.tokens)
        tile = tiling.tokens * tiling.channels
        factors = {"xs": tiling.tokens * self.terms, "ws": tiling.channels} | ({"part": tile} if body.halves else {})
        results = {"acc": tile, **({"more": tiling.channels} if self.epilogue.operands else {})}
        return Program(
            grid=(
                *(blocks(columns, tiling.columns), blocks(rows, tiling.rows)),
                *([math.prod(self.items)] if self.own else []),
            ),
            group=(tiling.columns, tiling.rows),
            body=body.text(f"{body.matrix.column} < {columns} and {body.row} < {rows}"),
            private=results if body.halves else results | factors,
            halves=factors if body.halves else {},
            shared={"near": tiling.staged * body.matrix.width} if tiling.staged else {},
        )


@dataclass(frozen=True)
class _Body:
    """The statements of a layer under one tiling; with `halves`, products are summed up in float16 at first."""

    of: Linear
    tiling: Tiling
    memory: Memory
    halves: bool

    @property
    def row(self) -> str:
        return f"by * {self.tiling.rows} + ty"

    @property
    def token(self) -> str:
        """Token i of the work-item, within its item of the batch."""
        return f"(({self.row}) * {self.tiling.tokens} + i)"

    @property
    def factor(self) -> str:
        return "float16" if self.halves else "float32"

    @property
    def matrix(self) -> Matrix:
        tiling = self.tiling
        return Matrix(
            memory=self.memory,
            k=self.of.k,
            channels=tiling.channels,
            group="bx",
            item="tx",
            items=tiling.columns,
            number=f"ty * {tiling.columns} + tx",
            size=tiling.columns * tiling.rows,
            staged=tiling.staged,
            image=tiling.image,
            factor=self.factor,
        )

    def text(self, inside: str) -> str:
        loops = self.products()
        # All work-items of a group bring weights, so those beyond an edge may as well compute what nobody stores.
        loops = loops if self.tiling.staged else nest(f"if {inside}:", loops)
        return "\n".join([self.each_sum("acc[s] = T.float32(0)"), loops, nest(f"if {inside}:", self.epilogue())])

    def each_sum(self, statement: str) -> str:
        return nest(f"for s in T.unroll({self.tiling.tokens * self.tiling.channels}):", statement)

    def each_token(self, *statements: str) -> str:
        return nest(f"for i in T.unroll({self.tiling.tokens}):", *statements)

    def each_channel(self, statement: str) -> str:
        return nest(f"for v in T.vectorized({self.tiling.channels}):", statement)

    def products(self) -> str:
        """acc += x @ w, some terms at a time."""
        of, terms = self.of, self.of.terms
        chunk = self.tiling.staged or (self.chunk if self.halves else terms)
        first = f"(io * {chunk} + ig * {terms})"
        at = f"{'part' if self.halves else 'acc'}[i * {self.tiling.channels} + v]"
        product = self.each_token(self.each_channel(f"{at} = {at} + xs[i * {terms} + ii] * ws[v]"))
        weights = self.matrix.load(of.within(f"({first} + ii)", of.c), f"(ig * {terms} + ii)")
        token = of.within(self.nearest, of.count)
        inputs = self.memory.load_lanes("xs", f"i * {terms}", "x", f"{token} * {of.c} + {first}", terms, self.factor)
        steps = [
            nest(
                f"for ig in range({chunk // terms}):",
                self.each_token(inputs),
                nest(f"for ii in T.unroll({terms}):", weights, product),
            )
        ]
        if self.halves:
            cleared, added = "part[s] = T.float16(0)", 'acc[s] = acc[s] + T.Cast("float32", part[s])'
            steps = [self.each_sum(cleared), *steps, self.each_sum(added)]
        if self.tiling.staged:
            steps = [self.matrix.staging(of.within(f"io * {chunk}", of.c)), *steps]
        return nest(f"for io in range({of.c // chunk}):", *steps)

    @property
    def chunk(self) -> int:
        """As many terms as float16 may sum up: a few loads."""
        return max(size for size in (1, 2, 4, HALF_TERMS) if self.of.c % size == 0)

    @property
    def nearest(self) -> str:
        """A token that is there: beyond the edge it is the last one once more."""
        together = self.tiling.tokens * (self.tiling.rows if self.tiling.staged else 1)
        return f"T.min({self.token}, {self.of.count - 1})" if self.of.count % together else self.token

    def epilogue(self) -> str:
        """The epilogue of every token, and away with the results."""
        channels, channel = self.tiling.channels, self.matrix.channel
        token = self.of.within(self.token, self.of.count)
        at, target = f"acc[i * {channels} + v]", f"{token} * {self.of.k} + {channel}"
        results = Results(self.memory, channels, at, f"{channel} + v", target)
        biased, *others = split(self.of.epilogue)
        steps = [self.each_channel(f"{at} = {at} + {results.bias}")] if biased else []
        for each in others:
            steps += results.through(each)
        steps.append(self.memory.store_lanes("out", target, "acc", f"i * {channels}", channels))
        if self.of.count % self.tiling.tokens:
            steps = [nest(f"if {self.token} < {self.of.count}:", *steps)]
        return self.each_token(*steps)
