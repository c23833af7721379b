"""Softmax over the last axis, in float32 however rows are stored.

NaN, an infinity, or nothing but minus infinity make a row NaN: by its sum, whatever its maximum is then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from schedules.gpu.epilogue import Results, epilogue_reads
from schedules.gpu.launch import Buffer, Limits, Lone, Program
from schedules.gpu.primitives import rows
from schedules.spec import Epilogue


@dataclass(frozen=True)
class Softmax(Lone):
    """out = epilogue(softmax(x))."""

    lead: tuple[int, ...]
    c: int
    epilogue: Epilogue = field(default=Epilogue())
    dtype: str = "float32"
    given: str = "float32"  # how x is stored

    NAME = "softmax"
    KNOBS = rows.Tiling

    @property
    def count(self) -> int:
        return math.prod(self.lead)

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": Buffer((*self.lead, self.c), self.given), **epilogue_reads(self.epilogue, self.out, self.c)}

    @property
    def out(self) -> Buffer:
        return Buffer((*self.lead, self.c), self.dtype)

    def offered(self, limits: Limits) -> list[rows.Tiling]:
        return rows.tilings(self.count, self.c, limits)

    def program(self, limits: Limits, tiling: rows.Tiling) -> Program:
        row = rows.Rows(self.memory(limits), self.count, self.c, tiling)
        power = f"T.exp({row.value} - top[0])"
        results = Results(row.memory, row.lanes, row.value, f"{row.column} + v", row.target)
        body = [
            *row.reduced("top[0]", "first", row.value, rows.larger, rows.LOWEST, loads=True),
            *row.summed("total[0]", "second", power),
            row.stored(f"{power} / total[0]", results.through(self.epilogue.steps)),
        ]
        more = {"more": row.lanes} if self.epilogue.operands else {}
        return Program(
            grid=row.grid,
            group=row.group,
            body="\n".join(body),
            private={**row.private, "top": 1, "total": 1, **more},
            shared={"first": row.shares, "second": row.shares},
        )
