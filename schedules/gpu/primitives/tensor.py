"""Products of two matrices on tensor cores: short numbers, summed up in float32.

No extent has to be a multiple of anything. A work-group brings some terms of its rows (of the left matrix) and of its
columns (of the right one) into local memory, zeros beyond every edge, while it reads those that come next. Its warps
multiply from there. The sums go through local memory once more, in rows, where the epilogue joins them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from schedules.dtypes import stored_as
from schedules.gpu.launch import BARRIER, Kernel, Limits, Memory, Program, blocks, nest
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
        """Rows of a work-group."""
        return SIDE * self.rows * self.high

    @property
    def broad(self) -> int:
        """Columns of a work-group."""
        return SIDE * self.columns * self.wide

    @property
    def warps(self) -> int:
        return self.high * self.wide


# Fragments above each other of a work-group of four warps: of each warp, and warps above each other.
HEIGHTS = ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2))
TERMS = (32, 48, 64, 16)


class OnTensorCores(Kernel):
    """A product in an arithmetic, its `dtype`, that tensor cores have."""

    KNOBS = Tiling
    dtype: str

    @property
    @abstractmethod
    def all_rows(self) -> int: ...

    @property
    @abstractmethod
    def depth(self) -> int:
        """Terms of every sum."""

    @property
    @abstractmethod
    def all_columns(self) -> int: ...

    @property
    def batch(self) -> int:
        """Of products, each of matrices of its own."""
        return 1

    @abstractmethod
    def body(self, tiling: Tiling, memory: Memory) -> Body: ...

    def pays(self, limits: Limits) -> bool:
        """Whether the device has tensor cores, and most of what they would compute is asked for."""
        if self.dtype not in limits.tensor_cores or self.default(limits) is None:
            return False
        share = 1.0
        for extent in (self.all_rows, self.depth, self.all_columns):
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
            if some and tiling.tall < self.all_rows + SIDE * rows and tiling.broad < self.all_columns + SIDE * columns:
                yield tiling

    def _guess(self, tiling: Tiling) -> tuple[int, int]:
        """How long the busiest multiprocessor computes; of equals, the one that takes less local memory."""
        groups = self.batch * blocks(self.all_rows, tiling.tall) * blocks(self.all_columns, tiling.broad)
        steps = blocks(self.depth, tiling.terms)
        one = tiling.tall * tiling.broad + STAGING * (tiling.tall + tiling.broad)
        return blocks(groups, MULTIPROCESSORS) * steps * (tiling.terms + STEP) * one, tiling.terms

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        body = self.body(tiling, self.memory(limits))
        # One dimension, because only the first may be large; rows first, because they share their columns.
        groups = body.tall_groups * blocks(self.all_columns, tiling.broad)
        return Program(
            grid=(groups, 1, self.batch) if self.batch > 1 else (groups,),
            group=(WARP, tiling.warps),
            body=body.text(),
            private={"result": body.lanes, "more": body.lanes, "sums": body.fragments.sums, **body.private},
            narrow=body.narrow,
            halves={"next_left": body.left.held, "next_right": body.right.held},
            shared={"rows": tiling.warps * SIDE * body.row, **body.shared},
            staged={"near_left": body.left.size, "near_right": body.right.size},
            hidden=body.fragments.registers,
        )


@dataclass(frozen=True)
class Staging:
    """`rows` of `width` numbers for local memory, which `items` work-items load `lanes` at a time."""

    width: int
    rows: int
    lanes: int
    items: int

    @property
    def stride(self) -> int:
        return self.width + SKEW

    @property
    def size(self) -> int:
        """Numbers of local memory."""
        return self.rows * self.stride

    @property
    def count(self) -> int:
        """Loads of all work-items."""
        return self.rows * self.width // self.lanes

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
    def row(self) -> str:
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
        place = f"({self.row}) * {self.stride} + {self.at}"
        moved = f"{near}[{place} + v] = {held}[e * {self.lanes} + v]"
        return self.each(nest(f"for v in T.vectorized({self.lanes}):", moved))


@dataclass(frozen=True)
class Body(ABC):
    """The statements of one product under one tiling."""

    of: Any
    tiling: Tiling
    memory: Memory

    beside = False  # whether a row of the left matrix is a row of local memory; otherwise it is a column there

    @property
    @abstractmethod
    def left(self) -> Staging: ...

    @property
    @abstractmethod
    def right(self) -> Staging: ...

    @property
    @abstractmethod
    def lanes(self) -> int:
        """Neighbouring results that are stored together."""

    @abstractmethod
    def fetch(self, step: str) -> list[str]:
        """Both matrices' numbers of a step into registers, zeros for what there is not."""

    @abstractmethod
    def finished(self, sums: str, row: str, place: str) -> str:
        """The epilogue for neighbouring sums of a row, from a work-group's column on, and away with the results."""

    @property
    def private(self) -> Mapping[str, int]:
        return {}

    @property
    def shared(self) -> Mapping[str, int]:
        return {}

    def before(self) -> list[str]:
        return []

    def beside_products(self) -> list[str]:
        """What else is done with what a step has brought."""
        return []

    def after(self) -> list[str]:
        return []

    @property
    def narrow(self) -> str:
        """The type of what is staged."""
        return stored_as(self.of.dtype)

    @property
    def items(self) -> int:
        return WARP * self.tiling.warps

    @property
    def fragments(self) -> Fragments:
        tiling, left, right = self.tiling, self.left.stride, self.right.stride
        return Fragments(
            self.of.dtype, tiling.rows, tiling.columns, tiling.terms, left, right, self.row, beside=self.beside
        )

    @property
    def tall_groups(self) -> int:
        return blocks(self.of.all_rows, self.tiling.tall)

    @property
    def first_row(self) -> str:
        return f"bx % {self.tall_groups} * {self.tiling.tall}"

    @property
    def first_column(self) -> str:
        return f"bx // {self.tall_groups} * {self.tiling.broad}"

    @property
    def row(self) -> int:
        """Numbers from one row of a warp's sums in local memory to the next."""
        return SIDE * self.tiling.columns + SKEW_SUMS

    def text(self) -> str:
        steps = blocks(self.of.depth, self.tiling.terms)
        left, right = self.left.put("near_left", "next_left"), self.right.put("near_right", "next_right")
        cleared = nest(f"for s in T.unroll({self.fragments.sums}):", "sums[s] = T.float32(0)")
        # Beyond the last step everything is an edge, and nothing is read.
        step = [left, right, BARRIER, *self.fetch("(io + 1)"), self.multiply(), *self.beside_products(), BARRIER]
        before = [cleared, *self.fetch("0"), *self.before()]
        return "\n".join([*before, nest(f"for io in range({steps}):", *step), *self.after(), self.epilogue()])

    def brought(self, into: str, staging: Staging, name: str, index: str, inside: str) -> str:
        """Loads of one matrix into registers."""
        at = f"e * {staging.lanes}"
        load = self.memory.load_lanes(into, at, name, index, staging.lanes, self.narrow)
        zero = nest(f"for v in T.vectorized({staging.lanes}):", f"{into}[{at} + v] = T.{self.narrow}(0)")
        return staging.each(zero, nest(f"if {inside}:", load))

    def multiply(self) -> str:
        """All products of what is in local memory."""
        rows, columns, wide = self.tiling.rows, self.tiling.columns, self.tiling.wide
        first = f"ty // {wide} * {SIDE * rows * (self.left.stride if self.beside else 1)}"
        return self.fragments.multiply(first, f"ty % {wide} * {SIDE * columns}")

    def epilogue(self) -> str:
        """The sums of a warp, one row of fragments after the other."""
        tiling, lanes = self.tiling, self.lanes
        rows, columns = tiling.rows, tiling.columns
        mine = f"ty * {SIDE * self.row}"
        stored = self.fragments.store(f"(i * {columns} + j)", "rows", f"{mine} + j * {SIDE}")
        loads = SIDE * columns // lanes  # of a row
        unit = f"(u * {WARP} + tx)"
        of_fragment, at = f"({unit} // {loads})", f"({unit} % {loads} * {lanes})"
        row = f"({self.first_row} + (ty // {tiling.wide} * {rows} + i) * {SIDE} + {of_fragment})"
        place = f"ty % {tiling.wide} * {SIDE * columns} + {at}"
        done = self.finished(f"rows[{mine} + {of_fragment} * {self.row} + {at} + v]", row, place)
        inside = f"{row} < {self.of.all_rows} and {self.column(place)} < {self.of.all_columns}"
        return nest(
            f"for i in T.unroll({rows}):",
            nest(f"for j in T.unroll({columns}):", stored),
            BARRIER,
            nest(f"for u in range({SIDE * loads // WARP}):", nest(f"if {inside}:", done)),
            BARRIER,
        )

    def column(self, place: str) -> str:
        """Of all, at a place among those of the work-group."""
        return f"({self.first_column} + {place})"

    def each_lane(self, statement: str) -> str:
        return nest(f"for v in T.vectorized({self.lanes}):", statement)


def widest(extent: int, size: int) -> int:
    """How many neighbours of a size in bytes can always be loaded together."""
    return next(lanes for lanes in (8, 4, 2, 1) if lanes * size <= WIDEST and extent % lanes == 0)
