"""Layer norm over the last axis: rows less their mean, over their deviation, in float32 however they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from schedules.gpu.epilogue import Results, epilogue_reads
from schedules.gpu.launch import Buffer, Kernel, Limits, Program
from schedules.gpu.primitives import rows
from schedules.spec import Epilogue


@dataclass(frozen=True)
class LayerNorm(Kernel):
    """out = epilogue((x - mean) / deviation * g + b), the deviation in a second pass because squares cancel."""

    lead: tuple[int, ...]
    c: int
    eps: float = 1e-5
    epilogue: Epilogue = field(default=Epilogue())
    dtype: str = "float32"
    given: str = "float32"  # how x is stored

    NAME = "layer_norm"
    KNOBS = rows.Tiling

    @property
    def count(self) -> int:
        return math.prod(self.lead)

    @property
    def reads(self) -> dict[str, Buffer]:
        found = {"x": Buffer((*self.lead, self.c), self.given), "g": Buffer((self.c,)), "b": Buffer((self.c,))}
        return {**found, **epilogue_reads(self.epilogue, self.out, self.c, bias="bias")}

    @property
    def out(self) -> Buffer:
        return Buffer((*self.lead, self.c), self.dtype)

    def offered(self, limits: Limits) -> list[rows.Tiling]:
        return rows.tilings(self.count, self.c, limits)

    def program(self, limits: Limits, tiling: rows.Tiling) -> Program:
        row = rows.Rows(self.memory(limits), self.count, self.c, tiling)
        away = f"({row.value} - mean[0])"
        results = Results(row.memory, row.lanes, row.value, f"{row.column} + v", row.target, offset="bias")
        normal = f"{away} * scale[0] * g[{row.column} + v] + b[{row.column} + v]"
        body = [
            *row.summed("mean[0]", "first", row.value, loads=True),
            f"mean[0] = mean[0] * T.float32({1 / self.c!r})",
            *row.summed("scale[0]", "second", f"{away} * {away}"),
            f"scale[0] = T.rsqrt(scale[0] * T.float32({1 / self.c!r}) + T.float32({self.eps!r}))",
            row.stored(normal, results.through(self.epilogue.steps)),
        ]
        more = {"more": row.lanes} if self.epilogue.operands else {}
        return Program(
            grid=row.grid,
            group=row.group,
            body="\n".join(body),
            private={**row.private, "mean": 1, "scale": 1, **more},
            shared={"first": row.shares, "second": row.shares},
        )
