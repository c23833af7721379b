"""Depthwise 3x3 with bias and GELU: a work-item a few rows of one column, a work-group within one channel."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from schedules.gpu.launch import Buffer, Kernel, Limits, Memory, Program, blocks, gelu, nest


@dataclass(frozen=True)
class Tiling:
    """Work-groups of `group` work-items, each with `tall` positions below each other."""

    group: int
    tall: int


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
        # Two rows share two of the three that each reads, as long as there are work-items enough.
        default = Tiling(limits.wave, 2 if self.h * self.w >= 8 * limits.wave else 1)
        return [default, *(Tiling(*knobs) for knobs in product((32, 64, 128, 256), (1, 2, 4)))]

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        group, tall = tiling.group, tiling.tall
        # Nine products are few enough for float16 to sum them up.
        halves = self.dtype == "float16" and limits.half
        columns = blocks(self.h, tall) * self.w
        at = f"(bx * {group} + tx)"
        numbers = {"acc": tall, "number": 1}
        return Program(
            grid=(blocks(columns, group), self.c, self.n),
            group=(group,),
            body=nest(f"if {at} < {columns}:", *self._statements(self.memory(limits), at, tall, halves)),
            private={"sum": 1} if halves else {"sum": 1} | numbers,
            halves=numbers if halves else {},
        )

    def _statements(self, memory: Memory, at: str, tall: int, halves: bool) -> list[str]:
        dtype = "float16" if halves else "float32"
        row, column = f"({at} // {self.w} * {tall})", f"({at} % {self.w})"
        plane = f"(bz * {self.c} + by) * {self.h * self.w}"
        found = [nest(f"for r in T.unroll({tall}):", f"acc[r] = T.{dtype}(0)")]
        for dy, dx in product(range(tall + 2), range(3)):
            y, x = f"{row} + {dy}", f"{column} + {dx}"
            inside = f"{y} >= 1 and {y} <= {self.h} and {x} >= 1 and {x} <= {self.w}"
            number = memory.load("x", f"{plane} + ({y} - 1) * {self.w} + {x} - 1", dtype)
            found += [f"number[0] = T.{dtype}(0)", nest(f"if {inside}:", f"number[0] = {number}")]
            for r in range(max(0, dy - 2), min(tall, dy + 1)):
                weight = memory.load("w", f"{((dy - r) * 3 + dx) * self.c} + by", dtype)
                found.append(f"acc[{r}] = acc[{r}] + {weight} * number[0]")
        for r in range(tall):
            total = f'T.Cast("float32", acc[{r}])' if halves else f"acc[{r}]"
            result = memory.store("out", f"{plane} + ({row} + {r}) * {self.w} + {column}", gelu("sum[0]"))
            found.append(nest(f"if {row} + {r} < {self.h}:", f"sum[0] = {total} + b[by]", result))
        return found
