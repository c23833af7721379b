"""Convolutions on tensor cores: a product of two matrices, weights by positions, of short numbers into float32.

The positions of all images of a batch are the columns of one matrix, so neither the batch nor the size of an image
has to be a multiple of anything. A work-group brings some terms (input channels of one tap of the kernel) of its
weights and inputs into local memory, zeros beyond every edge, while it reads those that come next. Its warps multiply
from there. The sums go through local memory once more, in rows, where the rank-one term and the epilogue join them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from schedules.dtypes import DTYPES, stored_as
from schedules.gpu.epilogue import Results, split
from schedules.gpu.launch import Limits, Memory, Program, blocks, nest
from schedules.gpu.primitives.conv import Conv, Convolution
from schedules.gpu.primitives.dots import Dots
from schedules.gpu.primitives.fragments import SIDE, WARP, Fragments

WIDEST = 16  # bytes of the widest load
SKEW = 8  # numbers between rows of local memory, so that rows below each other lie in different banks
SKEW_SUMS = 4  # likewise for float32
# For the default tiling, which is a guess of time: a GPU of many has about so many multiprocessors, bringing a number
# into local memory takes one of them as long as so many multiply-adds, and starting a step as long as so many terms.
MULTIPROCESSORS = 128
STAGING = 32
STEP = 8
ROOM = 160  # registers of a work-item, with which three work-groups of four warps share a multiprocessor
USEFUL = 0.5  # of what tensor cores compute, at least; they are several times as fast as all else


@dataclass(frozen=True)
class Tiling:
    """A warp has `rows` by `columns` fragments, a work-group `high` by `wide` warps; `terms` are staged at a time."""

    rows: int
    columns: int
    high: int
    wide: int
    terms: int

    @property
    def tall(self) -> int:
        """Output channels of a work-group."""
        return SIDE * self.rows * self.high

    @property
    def broad(self) -> int:
        """Columns of a work-group."""
        return SIDE * self.columns * self.wide

    @property
    def warps(self) -> int:
        return self.high * self.wide


# Fragments of output channels of a work-group of four warps: of each warp, and warps above each other.
HEIGHTS = ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2))
TERMS = (32, 48, 64, 16)


@dataclass(frozen=True)
class TensorConv(Convolution):
    """One in an arithmetic that tensor cores have."""

    NAME = "tensor_conv"
    KNOBS = Tiling

    @property
    def depth(self) -> int:
        """Terms of every sum."""
        return self.taps * self.c

    @property
    def all_columns(self) -> int:
        return self.n * self.positions

    def pays(self, limits: Limits) -> bool:
        """Whether the device has tensor cores, and most of what they would compute is asked for."""
        if self.dtype not in limits.tensor_cores or self.default(limits) is None:
            return False
        share = 1.0
        for extent in (self.k, self.depth, self.all_columns):
            share *= extent / (blocks(extent, SIDE) * SIDE)
        return share >= USEFUL

    def offered(self, limits: Limits) -> list[Tiling]:
        def roomy(tiling: Tiling) -> bool:
            return self.program(limits, tiling).usage[2] <= ROOM

        default = next(filter(roomy, sorted(self._sensible(), key=self._guess)))
        return [default, *self._searched()]

    def _sensible(self) -> Iterator[Tiling]:
        for (rows, high), columns, terms in product(HEIGHTS, (2, 1), TERMS):
            yield Tiling(rows, columns, high, 4 // high, terms)

    def _searched(self) -> Iterator[Tiling]:
        for rows, columns, high, wide, terms in product((1, 2, 3, 4), (1, 2, 4), (1, 2, 4), (1, 2, 4), TERMS):
            tiling = Tiling(rows, columns, high, wide, terms)
            some = rows * columns <= 8 and 2 <= tiling.warps <= 8 and terms < self.depth + SIDE
            if some and tiling.tall < self.k + SIDE * rows and tiling.broad < self.all_columns + SIDE * columns:
                yield tiling

    def _guess(self, tiling: Tiling) -> tuple[int, int]:
        """How long the busiest multiprocessor computes; of equals, the one that takes less local memory."""
        groups = blocks(self.k, tiling.tall) * blocks(self.all_columns, tiling.broad)
        steps = blocks(self.depth, tiling.terms)
        one = tiling.tall * tiling.broad + STAGING * (tiling.tall + tiling.broad)
        return blocks(groups, MULTIPROCESSORS) * steps * (tiling.terms + STEP) * one, tiling.terms

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        body = _Body(self, tiling, self.memory(limits))
        weights, inputs = body.weights, body.inputs
        return Program(
            # One dimension, because only the first may be large; channels first, because they share their inputs.
            grid=(body.tall_groups * blocks(self.all_columns, tiling.broad),),
            group=(WARP, tiling.warps),
            body=body.text(),
            private={"result": body.lanes, "more": body.lanes, "sums": body.fragments.sums}
            | (body.dots.private if self.common else {}),
            narrow=body.narrow,
            halves={"next_w": weights.held, "next_x": inputs.held},
            shared={"rows": tiling.warps * SIDE * body.row} | (body.dots.shared if self.common else {}),
            staged={"near_w": tiling.terms * weights.stride, "near_x": tiling.terms * inputs.stride},
            hidden=body.fragments.registers,
        )


@dataclass(frozen=True)
class _Staging:
    """`terms` rows of `width` numbers for local memory, which `items` work-items load `lanes` at a time."""

    width: int
    terms: int
    lanes: int
    items: int

    @property
    def stride(self) -> int:
        return self.width + SKEW

    @property
    def count(self) -> int:
        """Loads of all work-items."""
        return self.terms * self.width // self.lanes

    @property
    def turns(self) -> int:
        """Loads of a work-item."""
        return blocks(self.count, self.items)

    @property
    def held(self) -> int:
        return self.turns * self.lanes

    @property
    def which(self) -> str:
        """The load of a work-item in turn e, of all."""
        return f"(e * {self.items} + ty * {WARP} + tx)"

    @property
    def term(self) -> str:
        return f"{self.which} // {self.width // self.lanes}"

    @property
    def at(self) -> str:
        """Its first number in the row."""
        return f"{self.which} % {self.width // self.lanes} * {self.lanes}"

    def each(self, *statements: str) -> str:
        """Statements for every load."""
        inner = "\n".join(statements)
        if self.count % self.items:
            inner = nest(f"if {self.which} < {self.count}:", inner)
        return nest(f"for e in T.unroll({self.turns}):", inner)

    def put(self, near: str, held: str) -> str:
        """From registers into local memory."""
        place = f"({self.term}) * {self.stride} + {self.at}"
        moved = f"{near}[{place} + v] = {held}[e * {self.lanes} + v]"
        return self.each(nest(f"for v in T.vectorized({self.lanes}):", moved))


@dataclass(frozen=True)
class _Body:
    """The statements of one convolution under one tiling."""

    conv: TensorConv
    tiling: Tiling
    memory: Memory

    @property
    def narrow(self) -> str:
        """The type of what is staged."""
        return stored_as(self.conv.dtype)

    @property
    def fragments(self) -> Fragments:
        tiling, weights, inputs = self.tiling, self.weights.stride, self.inputs.stride
        return Fragments(self.conv.dtype, tiling.rows, tiling.columns, tiling.terms, weights, inputs, self.row)

    @property
    def dots(self) -> Dots:
        tiling = self.tiling
        return Dots(self.conv.depth, tiling.terms, self.inputs.stride, tiling.broad, WARP * tiling.warps)

    @property
    def tall_groups(self) -> int:
        return blocks(self.conv.k, self.tiling.tall)

    @property
    def first_channel(self) -> str:
        return f"bx % {self.tall_groups} * {self.tiling.tall}"

    @property
    def first_column(self) -> str:
        return f"bx // {self.tall_groups} * {self.tiling.broad}"

    @property
    def weights(self) -> _Staging:
        lanes = _widest(self.conv.k, DTYPES[self.narrow].bytes)
        return _Staging(self.tiling.tall, self.tiling.terms, lanes, WARP * self.tiling.warps)

    @property
    def inputs(self) -> _Staging:
        alike = self.conv.pointwise and self.conv.given == self.narrow
        lanes = _widest(self.conv.positions, DTYPES[self.narrow].bytes) if alike else 1
        return _Staging(self.tiling.broad, self.tiling.terms, lanes, WARP * self.tiling.warps)

    @property
    def lanes(self) -> int:
        """Neighbouring results that are stored together."""
        return _widest(self.conv.positions, DTYPES["float32"].bytes)

    @property
    def row(self) -> int:
        """Numbers from one row of a warp's sums in local memory to the next."""
        return SIDE * self.tiling.columns + SKEW_SUMS

    def text(self) -> str:
        steps = blocks(self.conv.depth, self.tiling.terms)
        weights, inputs = self.weights.put("near_w", "next_w"), self.inputs.put("near_x", "next_x")
        cleared = nest(f"for s in T.unroll({self.fragments.sums}):", "sums[s] = T.float32(0)")
        # Beyond the last step everything is an edge, and nothing is read.
        step = [weights, inputs, BARRIER, *self.fetch("(io + 1)"), self.multiply(), BARRIER]
        before, after = [cleared, *self.fetch("0")], [self.epilogue()]
        if self.conv.common:
            before.append(self.dots.cleared())
            step.insert(-1, self.dots.added("io"))
            after = [*self.dots.finished(BARRIER), *after]
        return "\n".join([*before, nest(f"for io in range({steps}):", *step), *after])

    # Into registers ---------------------------------------------------

    def fetch(self, step: str) -> list[str]:
        """The weights and inputs of a step, zeros for what there is not."""
        conv = self.conv
        weights, term = self.weights, f"({step} * {self.tiling.terms} + {self.weights.term})"
        channel = f"({self.first_channel} + {weights.at})"
        load = self.memory.load_lanes(
            "next_w", f"e * {weights.lanes}", "w", f"{term} * {conv.k} + {channel}", weights.lanes, self.narrow
        )
        brought = nest(f"if {term} < {conv.depth} and {channel} < {conv.k}:", load)
        return [weights.each(self.zero("next_w", weights.lanes), brought), self.fetch_inputs(step)]

    def fetch_inputs(self, step: str) -> str:
        conv, inputs = self.conv, self.inputs
        term = f"({step} * {self.tiling.terms} + {inputs.term})"
        column = f"({self.first_column} + {inputs.at})"
        image, position = f"({column} // {conv.positions})", f"({column} % {conv.positions})"
        plane, inside = f"({image} * {conv.c} + {term})", ""
        if not conv.pointwise:
            plane = f"({image} * {conv.c} + {term} % {conv.c})"
            position, inside = self.tapped(f"({term} // {conv.c})", position)
        load = self.memory.load_lanes(
            "next_x", f"e * {inputs.lanes}", "x", f"{plane} * {conv.h * conv.w} + {position}", inputs.lanes, self.narrow
        )
        brought = nest(f"if {term} < {conv.depth} and {column} < {conv.all_columns}{inside}:", load)
        return inputs.each(self.zero("next_x", inputs.lanes), brought)

    def tapped(self, tap: str, position: str) -> tuple[str, str]:
        """Where in the input plane a tap of the kernel reads for a position of the output, and what must hold."""
        conv = self.conv
        (down, across), (apart, beside), (above, left, _, _) = conv.strides, conv.dilation, conv.padding
        y = f"({position} // {conv.width} * {down} + {tap} // {conv.kernel[1]} * {apart} - {above})"
        x = f"({position} % {conv.width} * {across} + {tap} % {conv.kernel[1]} * {beside} - {left})"
        inside = f" and {y} >= 0 and {y} < {conv.h} and {x} >= 0 and {x} < {conv.w}" if any(conv.padding) else ""
        return f"{y} * {conv.w} + {x}", inside

    def zero(self, held: str, lanes: int) -> str:
        return nest(f"for v in T.vectorized({lanes}):", f"{held}[e * {lanes} + v] = T.{self.narrow}(0)")

    # Products ---------------------------------------------------------

    def multiply(self) -> str:
        """All products of what is in local memory."""
        rows, columns, wide = self.tiling.rows, self.tiling.columns, self.tiling.wide
        return self.fragments.multiply(f"ty // {wide} * {SIDE * rows}", f"ty % {wide} * {SIDE * columns}")

    # Results ----------------------------------------------------------

    def epilogue(self) -> str:
        """The sums of a warp, one row of fragments after the other."""
        rows, columns = self.tiling.rows, self.tiling.columns
        mine = f"ty * {SIDE * self.row}"
        stored = self.fragments.store(f"(i * {columns} + j)", "rows", f"{mine} + j * {SIDE}")
        loads = SIDE * columns // self.lanes  # of a row
        return nest(
            f"for i in T.unroll({rows}):",
            nest(f"for j in T.unroll({columns}):", stored),
            BARRIER,
            nest(f"for u in range({SIDE * loads // WARP}):", self.finished(mine, loads)),
            BARRIER,
        )

    def finished(self, mine: str, loads: int) -> str:
        """Rank-one term and epilogue for neighbouring results of one output channel, and away with them."""
        conv, lanes, tiling = self.conv, self.lanes, self.tiling
        unit = f"(u * {WARP} + tx)"
        row, at = f"({unit} // {loads})", f"({unit} % {loads} * {lanes})"
        channel = f"({self.first_channel} + (ty // {tiling.wide} * {tiling.rows} + i) * {SIDE} + {row})"
        column = f"({self.first_column} + ty % {tiling.wide} * {SIDE * tiling.columns} + {at})"
        target = (
            f"({column} // {conv.positions} * {conv.k} + {channel}) * {conv.positions} + {column} % {conv.positions}"
        )
        results = Results(
            self.memory, lanes, "result[v]", channel, target, f"{column} // {conv.positions} * {conv.k} + {channel}"
        )
        biased, *others = split(conv.epilogue)
        value, found = f"rows[{mine} + {row} * {self.row} + {at} + v]", []
        value += f" + {results.bias}" if biased else ""
        if conv.common:
            near = f"ty % {tiling.wide} * {SIDE * tiling.columns} + {at} + v"
            found.append(self.each_lane(f"more[v] = near_common[{near}]"))
        elif conv.rank_one:
            found.append(self.memory.load_lanes("more", "0", "by_position", column, lanes))
        if conv.rank_one:
            value += f" - more[v] * by_channel[{channel}]"
        found.append(self.each_lane(f"result[v] = {value}"))
        for steps in others:
            found += results.through(steps)
        found.append(self.memory.store_lanes("out", target, "result", "0", lanes))
        return nest(f"if {channel} < {conv.k} and {column} < {conv.all_columns}:", *found)

    def each_lane(self, statement: str) -> str:
        return nest(f"for v in T.vectorized({self.lanes}):", statement)


BARRIER = 'T.evaluate(T.tvm_storage_sync("shared"))'


def _widest(extent: int, size: int) -> int:
    """How many neighbours of a size in bytes can always be loaded together."""
    return next(lanes for lanes in (8, 4, 2, 1) if lanes * size <= WIDEST and extent % lanes == 0)


def convolution(limits: Limits, **shape: Any) -> Convolution:
    """The kernel of a convolution: on tensor cores where that pays, else the one that every device can run."""
    kernel = TensorConv(**shape)
    return kernel if kernel.pays(limits) else Conv(**shape | {"dtype": stored_as(kernel.dtype)})
