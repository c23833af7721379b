"""Depthwise 3x3 with bias and GELU: a work-item a few rows of a few columns, a work-group within one channel.

A result is nine multiply-adds and a GELU for two numbers moved, so loads are what there must be few of: neighbouring
columns come in one, and each number that a work-item has read serves all results that it touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from schedules.gpu.launch import Buffer, Kernel, Limits, Memory, Program, blocks, gelu, nest

ROOMY = 192  # registers of a work-item, more than any mobile GPU has: there wide tiles are left to tuning


@dataclass(frozen=True)
class Tiling:
    """Work-groups of `group` work-items, each with `wide` positions side by side in `tall` rows."""

    group: int
    tall: int
    wide: int


@dataclass(frozen=True)
class Depthwise(Kernel):
    """out = gelu(w * x + b), same size, zeros around."""

    n: int
    c: int
    h: int
    w: int
    dtype: str = "float32"

    NAME = "depthwise"
    KNOBS = Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": self.out, "w": Buffer((3, 3, self.c), self.dtype), "b": Buffer((self.c,))}

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, self.c, self.h, self.w), self.dtype)

    def offered(self, limits: Limits) -> list[Tiling]:
        widths = [wide for wide in (4, 2, 1) if self.w % wide == 0]
        # Two rows share two of the three that each reads, as long as there are work-items enough.
        tall = 2 if self.h * self.w >= 8 * limits.wave else 1
        default = Tiling(limits.wave, tall, widths[0] if limits.registers_per_item > ROOMY else 1)
        return [default, *(Tiling(*knobs) for knobs in product((32, 64, 128, 256), (1, 2, 4), widths))]

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        group, tall, wide = tiling.group, tiling.tall, tiling.wide
        # Nine products are few enough for float16 to sum them up.
        halves = self.dtype == "float16" and limits.half
        items = blocks(self.h, tall) * (self.w // wide)
        numbers = {"acc": tall * wide, "near": wide, "number": wide + 2}
        body = _Body(self, tiling, self.memory(limits), "float16" if halves else "float32")
        return Program(
            grid=(blocks(items, group), self.c, self.n),
            group=(group,),
            body=nest(f"if {body.item} < {items}:", *body.statements()),
            private={"sum": wide} if halves else {"sum": wide} | numbers,
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
        return f"({self.item} // {self.of.w // self.tiling.wide} * {self.tiling.tall})"

    @property
    def column(self) -> str:
        return f"({self.item} % {self.of.w // self.tiling.wide} * {self.tiling.wide})"

    @property
    def plane(self) -> str:
        return f"(bz * {self.of.c} + by) * {self.of.h * self.of.w}"

    def statements(self) -> list[str]:
        tall, wide = self.tiling.tall, self.tiling.wide
        found = [nest(f"for s in T.unroll({tall * wide}):", f"acc[s] = T.{self.dtype}(0)")]
        for dy in range(tall + 2):
            found.append(self.load_row(dy))
            rows = range(max(0, dy - 2), min(tall, dy + 1))
            found += [self.multiply(r, dy - r, dx) for r, dx in product(rows, range(3))]
        return [*found, *map(self.finish, range(tall))]

    def load_row(self, dy: int) -> str:
        """The row dy - 1 of the work-item's first, zeros beyond the image."""
        wide, last = self.tiling.wide, self.tiling.wide + 1
        y, column = f"({self.row} + {dy})", self.column
        start = f"{self.plane} + ({y} - 1) * {self.of.w} + {column}"
        before, after = (self.memory.load("x", f"{start} {step}", self.dtype) for step in ("- 1", f"+ {wide}"))
        return "\n".join(
            [
                nest(f"for s in T.unroll({wide + 2}):", f"number[s] = T.{self.dtype}(0)"),
                nest(
                    f"if {y} >= 1 and {y} <= {self.of.h}:",
                    self.memory.load_lanes("near", "0", "x", start, wide, self.dtype),
                    nest(f"for s in T.unroll({wide}):", "number[s + 1] = near[s]"),
                    nest(f"if {column} >= 1:", f"number[0] = {before}"),
                    nest(f"if {column} + {wide} < {self.of.w}:", f"number[{last}] = {after}"),
                ),
            ]
        )

    def multiply(self, r: int, dy: int, dx: int) -> str:
        wide = self.tiling.wide
        weight = self.memory.load("w", f"{(dy * 3 + dx) * self.of.c} + by", self.dtype)
        total = f"acc[{r * wide} + s]"
        return nest(f"for s in T.unroll({wide}):", f"{total} = {total} + {weight} * number[s + {dx}]")

    def finish(self, r: int) -> str:
        wide = self.tiling.wide
        total = f"acc[{r * wide} + v]"
        total = total if self.dtype == "float32" else f'T.Cast("float32", {total})'
        target = f"{self.plane} + ({self.row} + {r}) * {self.of.w} + {self.column}"
        return nest(
            f"if {self.row} + {r} < {self.of.h}:",
            nest(f"for v in T.vectorized({wide}):", f"sum[v] = {total} + b[by]"),
            nest(f"for v in T.vectorized({wide}):", f"sum[v] = {gelu('sum[v]')}"),
            self.memory.store_lanes("out", target, "sum", "0", wide),
        )
