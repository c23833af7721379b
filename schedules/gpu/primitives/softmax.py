"""Softmax over the last axis.

NaN, an infinity, or nothing but minus infinity make a row NaN: by its sum, whatever its maximum is then.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.epilogue import Results, epilogue_reads
from schedules.gpu.launch import Buffer, Limits, Lone, Program
from schedules.gpu.primitives import rows


@dataclass(frozen=True)
class Softmax(rows.OfRows, Lone):
    """out = epilogue(softmax(x))."""

    NAME = "softmax"

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": self.x, **epilogue_reads(self.epilogue, self.out, self.c)}

    def program(self, limits: Limits, tiling: rows.Tiling) -> Program:
        row = self.rows(limits, tiling)
        power = f"T.exp({row.value} - top[0])"
        results = Results(row.memory, row.lanes, row.value, f"{row.column} + v", row.target)
        body = [
            *row.reduced("top[0]", "first", row.value, rows.larger, rows.LOWEST, loads=True),
            *row.summed("total[0]", "second", power),
            row.stored(f"{power} / total[0]", results.through(self.epilogue.steps)),
        ]
        return self.swept(row, body, ["top", "total"])
