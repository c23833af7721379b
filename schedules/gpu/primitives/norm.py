"""Layer norm over the last axis: rows less their mean, over their deviation."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.epilogue import Results, epilogue_reads
from schedules.gpu.launch import Buffer, Limits, Program
from schedules.gpu.primitives import rows


@dataclass(frozen=True)
class LayerNorm(rows.OfRows):
    """out = epilogue((x - mean) / deviation * g + b), the deviation in a second pass because squares cancel."""

    eps: float = 1e-5

    NAME = "layer_norm"

    @property
    def reads(self) -> dict[str, Buffer]:
        own = {"x": self.x, "g": Buffer((self.c,)), "b": Buffer((self.c,))}
        return {**own, **epilogue_reads(self.epilogue, self.out, self.c, bias="bias")}

    def program(self, limits: Limits, tiling: rows.Tiling) -> Program:
        row = self.rows(limits, tiling)
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
        return self.swept(row, body, ["mean", "scale"])
