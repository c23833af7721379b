"""Pooling: the largest value or the mean of windows, and the mean of a whole image."""

from __future__ import annotations

from dataclasses import dataclass, field

from schedules.gpu.epilogue import Results, epilogue_reads
from schedules.gpu.launch import Buffer, Limits, Lone, Program, blocks, nest
from schedules.gpu.primitives import head, rows
from schedules.gpu.primitives.windows import Windows
from schedules.spec import Epilogue

WRITTEN_OUT = 9  # taps that are no loop


@dataclass(frozen=True)
class Pool(Windows, Lone):
    """out = epilogue(largest or mean of a window): a work-item a result, whose neighbours have read most of it."""

    mode: str = "max"
    count_padding: bool = False  # whether the mean counts what is padded
    epilogue: Epilogue = field(default=Epilogue())
    dtype: str = "float32"
    given: str = "float32"  # how x is stored

    NAME = "pool"
    KNOBS = head.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        image = Buffer((self.n, self.c, self.h, self.w), self.given)
        return {"x": image, **epilogue_reads(self.epilogue, self.out, self.c, self.n)}

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, self.c, self.height, self.width), self.dtype)

    def offered(self, limits: Limits) -> list[head.Tiling]:
        return head.groups(limits)

    def program(self, limits: Limits, tiling: head.Tiling) -> Program:
        memory, positions = self.memory(limits), self.height * self.width
        item = f"(bx * {tiling.group} + tx)"
        results = Results(memory, 1, "acc[0]", f"{item} // {positions} % {self.c}", item, f"{item} // {positions}")
        count = f"T.float32({self.taps})" if self.count_padding else "count[0]"
        body = [
            "acc[0] = T.float32(0)",
            "count[0] = T.float32(0)",
            self._taps(item, memory.load("x", f"{item} // {positions} * {self.h * self.w} + {self._place(item)}")),
            *([f"acc[0] = acc[0] / {count}"] if self.mode == "avg" else []),
            *results.through(self.epilogue.steps),
            memory.store("out", item, "acc[0]"),
        ]
        return Program(
            grid=(blocks(self.out.size, tiling.group),),
            group=(tiling.group,),
            body=nest(f"if {item} < {self.out.size}:", *body),
            private={"acc": 1, "count": 1, "near": 1, **({"more": 1} if self.epilogue.operands else {})},
        )

    def _taps(self, item: str, loaded: str) -> str:
        """Everything that a window sees, beginning with the first, which may be minus infinity."""
        loop = "T.unroll" if self.taps <= WRITTEN_OUT else "range"
        taken = "acc[0] = acc[0] + near[0]"
        if self.mode == "max":
            # No T.max: a device may take the other number where one is NaN.
            taken = nest("if count[0] == T.float32(0) or acc[0] < near[0] or T.isnan(near[0]):", "acc[0] = near[0]")
        row, column = self._row(item), self._column(item)
        tap = nest(
            f"if {column} >= 0 and {column} < {self.w}:",
            f"near[0] = {loaded}",
            taken,
            "count[0] = count[0] + T.float32(1)",
        )
        line = nest(f"if {row} >= 0 and {row} < {self.h}:", nest(f"for dx in {loop}({self.kernel[1]}):", tap))
        return nest(f"for dy in {loop}({self.kernel[0]}):", line)

    def _row(self, item: str) -> str:
        (down, _), (apart, _), above = self.strides, self.dilation, self.padding[0]
        return f"({item} // {self.width} % {self.height} * {down} + dy * {apart} - {above})"

    def _column(self, item: str) -> str:
        (_, across), (_, apart), left = self.strides, self.dilation, self.padding[1]
        return f"({item} % {self.width} * {across} + dx * {apart} - {left})"

    def _place(self, item: str) -> str:
        return f"{self._row(item)} * {self.w} + {self._column(item)}"


@dataclass(frozen=True)
class Mean(Lone):
    """out = epilogue(mean(x)) of every channel over all positions of an image."""

    n: int
    c: int
    h: int
    w: int
    epilogue: Epilogue = field(default=Epilogue())
    dtype: str = "float32"
    given: str = "float32"  # how x is stored

    NAME = "mean"
    KNOBS = rows.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        image = Buffer((self.n, self.c, self.h, self.w), self.given)
        return {"x": image, **epilogue_reads(self.epilogue, self.out, self.c)}

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, self.c), self.dtype)

    def offered(self, limits: Limits) -> list[rows.Tiling]:
        return rows.tilings(self.n * self.c, self.h * self.w, limits)

    def program(self, limits: Limits, tiling: rows.Tiling) -> Program:
        """A channel of an image is a row of neighbours."""
        area = self.h * self.w
        row = rows.Rows(self.memory(limits), self.n * self.c, area, tiling)
        results = Results(row.memory, 1, "total[0]", f"{row.row} % {self.c}", row.row)
        stored = nest(
            f"if tx == 0 and {row.row} < {row.count}:",
            f"total[0] = total[0] * T.float32({1 / area!r})",
            *results.through(self.epilogue.steps),
            row.memory.store("out", row.row, "total[0]"),
        )
        return Program(
            grid=row.grid,
            group=row.group,
            body="\n".join([*row.summed("total[0]", "first", row.value, loads=True), stored]),
            private={**row.private, "total": 1, **({"more": 1} if self.epilogue.operands else {})},
            shared={"first": row.shares},
        )
