"""Depthwise convolutions of any kernel: a work-item a few rows of a few columns, a work-group within one channel.

A result of a 3x3 is nine multiply-adds and an epilogue for two numbers moved, so loads are what there must be few of:
neighbouring columns come in one, and each number that a work-item has read serves all results that it touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from schedules.gpu.epilogue import BIAS, Results, epilogue_reads, split
from schedules.gpu.launch import Buffer, Kernel, Limits, Memory, Program, blocks, nest
from schedules.gpu.primitives.windows import Windows
from schedules.spec import Epilogue

ROOMY = 192  # registers of a work-item, more than any mobile GPU has: there wide tiles are left to tuning
FEW_TAPS = 9  # products that float16 may sum up
MOST_TAPS = 121  # all of them are written out


@dataclass(frozen=True)
class Tiling:
    """Work-groups of `group` work-items, each with `wide` positions side by side in `tall` rows."""

    group: int
    tall: int
    wide: int


@dataclass(frozen=True)
class Depthwise(Windows, Kernel):
    """out = epilogue(w * x), zeros around."""

    epilogue: Epilogue = BIAS
    dtype: str = "float32"

    NAME = "depthwise"
    KNOBS = Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        image, taps = Buffer((self.n, self.c, self.h, self.w), self.dtype), Buffer((*self.kernel, self.c), self.dtype)
        return {"x": image, "w": taps, **epilogue_reads(self.epilogue, self.out, self.c, self.n)}

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, self.c, self.height, self.width), self.dtype)

    def offered(self, limits: Limits) -> list[Tiling]:
        widths = [wide for wide in (4, 2, 1) if self.width % wide == 0]
        # Two rows share two of the three that each reads, as long as there are work-items enough.
        tall = 2 if self.height * self.width >= 8 * limits.wave else 1
        default = Tiling(limits.wave, tall, widths[0] if limits.registers_per_item > ROOMY else 1)
        return [default, *(Tiling(*knobs) for knobs in product((32, 64, 128, 256), (1, 2, 4), widths))]

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        group, tall, wide = tiling.group, tiling.tall, tiling.wide
        halves = self.dtype == "float16" and limits.half and self.taps <= FEW_TAPS
        items = blocks(self.height, tall) * (self.width // wide)
        body = _Body(self, tiling, self.memory(limits), "float16" if halves else "float32")
        numbers = {"acc": tall * wide, "near": wide, "number": body.numbers}
        results = {"sum": wide, **({"more": wide} if self.epilogue.operands else {})}
        return Program(
            grid=(blocks(items, group), self.c, self.n),
            group=(group,),
            body=nest(f"if {body.item} < {items}:", *body.statements()),
            private=results if halves else results | numbers,
            halves=numbers if halves else {},
        )


@dataclass(frozen=True)
class _Body:
    """The statements of a work-item; sums are of `dtype`, and `number` is a part of one row with its neighbours."""

    of: Depthwise
    tiling: Tiling
    memory: Memory
    dtype: str

    @property
    def item(self) -> str:
        return f"(bx * {self.tiling.group} + tx)"

    @property
    def row(self) -> str:
        return f"({self.item} // {self.of.width // self.tiling.wide} * {self.tiling.tall})"

    @property
    def column(self) -> str:
        return f"({self.item} % {self.of.width // self.tiling.wide} * {self.tiling.wide})"

    @property
    def plane(self) -> str:
        return f"(bz * {self.of.c} + by)"

    @property
    def numbers(self) -> int:
        """Of a row, that the results beside each other need."""
        return (self.tiling.wide - 1) * self.of.strides[1] + self.of.span[1]

    @property
    def inner(self) -> range:
        """Those of them that are never beyond an edge and can be loaded together, if there are any."""
        of, wide = self.of, self.tiling.wide
        left, count = of.padding[1], wide * of.strides[1]
        # Rows that begin at a multiple of `wide`, like every load within them.
        together = of.w == of.width * of.strides[1] and left + count <= self.numbers
        return range(left, left + count) if together else range(0)

    def statements(self) -> list[str]:
        of, tall, wide = self.of, self.tiling.tall, self.tiling.wide
        found = [nest(f"for s in T.unroll({tall * wide}):", f"acc[s] = T.{self.dtype}(0)")]
        places = {(r, dy): r * of.strides[0] + dy * of.dilation[0] for r in range(tall) for dy in range(of.kernel[0])}
        for row in sorted(set(places.values())):
            found.append(self.load_row(row))
            found += [self.multiply(r, dy) for (r, dy), place in places.items() if place == row]
        return [*found, *map(self.finish, range(tall))]

    def load_row(self, row: int) -> str:
        """A row of the input, counted from the first that the work-item's first results see; zeros beyond the image."""
        of, wide, (above, left, _, _) = self.of, self.tiling.wide, self.of.padding
        y = f"({self.row} * {of.strides[0]} + {row})"
        start = f"{self.plane} * {of.h * of.w} + ({y} - {above}) * {of.w} + {self.column} * {of.strides[1]}"
        found = []
        for first in self.inner[::wide]:
            found.append(self.memory.load_lanes("near", "0", "x", f"{start} + {first - left}", wide, self.dtype))
            found.append(nest(f"for s in T.unroll({wide}):", f"number[s + {first}] = near[s]"))
        found += [self.load_number(start, at) for at in range(self.numbers) if at not in self.inner]
        return "\n".join(
            [
                nest(f"for s in T.unroll({self.numbers}):", f"number[s] = T.{self.dtype}(0)"),
                nest(f"if {y} >= {above} and {y} <= {of.h + above - 1}:", *found),
            ]
        )

    def load_number(self, start: str, at: int) -> str:
        """One number of a row, unless it is beyond an edge."""
        of, away = self.of, at - self.of.padding[1]
        column, last = f"{self.column} * {of.strides[1]}", (of.width - self.tiling.wide) * of.strides[1] + away
        inside = [f"{column} >= {-away}"] if away < 0 else []
        step = f"- {-away}" if away < 0 else f"+ {away}"
        inside += [f"{column} {step} < {of.w}"] if last >= of.w else []
        loaded = f"number[{at}] = {self.memory.load('x', f'{start} {step}', self.dtype)}"
        return nest(f"if {' and '.join(inside)}:", loaded) if inside else loaded

    def multiply(self, r: int, dy: int) -> str:
        """A row of the kernel, for the work-item's row r of results."""
        of, wide, total = self.of, self.tiling.wide, f"acc[{r * self.tiling.wide} + s]"
        found = []
        for dx in range(of.kernel[1]):
            weight = self.memory.load("w", f"{(dy * of.kernel[1] + dx) * of.c} + by", self.dtype)
            number = f"number[s * {of.strides[1]} + {dx * of.dilation[1]}]"
            found.append(nest(f"for s in T.unroll({wide}):", f"{total} = {total} + {weight} * {number}"))
        return "\n".join(found)

    def finish(self, r: int) -> str:
        of, wide = self.of, self.tiling.wide
        total = f"acc[{r * wide} + v]"
        total = total if self.dtype == "float32" else f'T.Cast("float32", {total})'
        row = f"{self.row} + {r}"
        target = f"{self.plane} * {of.height * of.width} + ({row}) * {of.width} + {self.column}"
        results = Results(self.memory, wide, "sum[v]", "by", target, self.plane)
        biased, *others = split(of.epilogue)
        value = f"{total} + {results.bias}" if biased else total
        return nest(
            f"if {row} < {of.height}:",
            nest(f"for v in T.vectorized({wide}):", f"sum[v] = {value}"),
            *(statement for steps in others for statement in results.through(steps)),
            self.memory.store_lanes("out", target, "sum", "0", wide),
        )
