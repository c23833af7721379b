"""Rows of neighbours: some work-items share a row, load by load, and meet in local memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

from schedules.gpu.launch import Buffer, Kernel, Limits, Memory, Program, blocks, nest
from schedules.spec import Epilogue

KEPT = 16  # numbers of a row that a work-item keeps in registers; of more, every sweep reads them again
# The smallest number of float32, by its bits: TVM writes decimals with seven digits, which are another number.
LOWEST = 'T.reinterpret("float32", T.uint32(0xFF7FFFFF))'


@dataclass(frozen=True)
class Tiling:
    """Work-groups of `rows` rows, each of which `parts` work-items share."""

    rows: int
    parts: int


def lanes_of(width: int) -> int:
    """How many neighbours of a row can always be loaded together."""
    return next(lanes for lanes in (4, 2, 1) if width % lanes == 0)


def tilings(count: int, width: int, limits: Limits) -> list[Tiling]:
    """Ways to share rows, the default first."""
    # Where local memory is main memory, few share a row, if the rows alone keep the device busy.
    most = 32 if limits.local_is_fast or count < 4 * limits.wave else 8
    parts = min(most, power_of_two(blocks(width, lanes_of(width))))
    default = Tiling(max(1, min(limits.wave // parts, count)), parts)
    return [default, *(Tiling(*knobs) for knobs in product((1, 2, 4, 8, 16), (4, 8, 16, 32, 64)))]


def power_of_two(count: int) -> int:
    """The next one from `count` on."""
    return 1 << (count - 1).bit_length()


def add(a: str, b: str) -> str:
    return f"{a} + {b}"


def larger(a: str, b: str) -> str:
    """What is not a number may be lost here: whoever wants it must find it in a sum."""
    return f"T.max({a}, {b})"


@dataclass(frozen=True)
class Rows:
    """The sweeps of work-items (tx, ty) over `count` rows of the input x; all of a row's get what is reduced.

    Beyond the last row they do the last one once more, because all of a group must meet.
    """

    memory: Memory
    count: int
    width: int
    tiling: Tiling

    @property
    def lanes(self) -> int:
        return lanes_of(self.width)

    @property
    def turns(self) -> int:
        """Loads of a work-item."""
        return blocks(self.width, self.tiling.parts * self.lanes)

    @property
    def keeps(self) -> bool:
        return self.turns * self.lanes <= KEPT

    @property
    def row(self) -> str:
        return f"(bx * {self.tiling.rows} + ty)"

    @property
    def nearest(self) -> str:
        return f"T.min({self.row}, {self.count - 1})" if self.count % self.tiling.rows else self.row

    @property
    def column(self) -> str:
        """The first of a load."""
        return f"((k * {self.tiling.parts} + tx) * {self.lanes})"

    @property
    def at(self) -> str:
        """Where a load begins in `near`."""
        return f"k * {self.lanes}" if self.keeps else "0"

    @property
    def value(self) -> str:
        """Number v of a load."""
        return f"near[{self.at} + v]"

    @property
    def grid(self) -> tuple[int]:
        return (blocks(self.count, self.tiling.rows),)

    @property
    def group(self) -> tuple[int, int]:
        return self.tiling.parts, self.tiling.rows

    @property
    def private(self) -> dict[str, int]:
        return {"near": self.turns * self.lanes if self.keeps else self.lanes, "acc": 1}

    @property
    def shares(self) -> int:
        """Numbers of local memory in which a group meets once."""
        return self.tiling.parts * self.tiling.rows

    def sweep(self, *statements: str, loads: bool = False) -> str:
        """Statements for every load of a row; the first sweep over it `loads`."""
        inner = list(statements)
        if loads or not self.keeps:
            start = f"{self.nearest} * {self.width} + {self.column}"
            inner.insert(0, self.memory.load_lanes("near", self.at, "x", start, self.lanes))
        if self.width % (self.tiling.parts * self.lanes):
            inner = [nest(f"if {self.column} < {self.width}:", *inner)]
        return nest(f"for k in {'T.unroll' if self.keeps else 'range'}({self.turns}):", *inner)

    def each_lane(self, statement: str) -> str:
        return nest(f"for v in T.unroll({self.lanes}):", statement)

    def reduced(
        self, into: str, part: str, term: str, combine: Callable[[str, str], str], start: str, loads: bool = False
    ) -> list[str]:
        """A term over a whole row; `part` is the local memory to meet in."""
        parts = self.tiling.parts
        return [
            f"acc[0] = {start}",
            self.sweep(self.each_lane(f"acc[0] = {combine('acc[0]', term)}"), loads=loads),
            f"{part}[ty * {parts} + tx] = acc[0]",
            f"{into} = {start}",
            nest(f"for p in range({parts}):", f"{into} = {combine(into, f'{part}[ty * {parts} + p]')}"),
        ]

    def summed(self, into: str, part: str, term: str, loads: bool = False) -> list[str]:
        return self.reduced(into, part, term, add, "T.float32(0)", loads)

    def stored(self, value: str, finish: list[str]) -> str:
        """A last sweep: a new value for every number, what else is done to it, and away with it."""
        store = self.memory.store_lanes("out", self.target, "near", self.at, self.lanes)
        sweep = self.sweep(self.each_lane(f"{self.value} = {value}"), *finish, store)
        return nest(f"if {self.row} < {self.count}:", sweep)

    @property
    def target(self) -> str:
        return f"{self.row} * {self.width} + {self.column}"


@dataclass(frozen=True)
class OfRows(Kernel):
    """A kernel that makes every row of the same row of x, in float32 however rows are stored."""

    lead: tuple[int, ...]
    c: int
    epilogue: Epilogue = field(default=Epilogue())
    dtype: str = "float32"
    given: str = "float32"  # how x is stored

    KNOBS = Tiling

    @property
    def x(self) -> Buffer:
        return Buffer((*self.lead, self.c), self.given)

    @property
    def out(self) -> Buffer:
        return Buffer((*self.lead, self.c), self.dtype)

    def offered(self, limits: Limits) -> list[Tiling]:
        return tilings(math.prod(self.lead), self.c, limits)

    def rows(self, limits: Limits, tiling: Tiling) -> Rows:
        return Rows(self.memory(limits), math.prod(self.lead), self.c, tiling)

    def swept(self, row: Rows, body: Sequence[str], statistics: Sequence[str]) -> Program:
        """Sweeps over rows, with some numbers of each, for which a group meets twice."""
        more = {"more": row.lanes} if self.epilogue.operands else {}
        return Program(
            grid=row.grid,
            group=row.group,
            body="\n".join(body),
            private={**row.private, **dict.fromkeys(statistics, 1), **more},
            shared={"first": row.shares, "second": row.shares},
        )
