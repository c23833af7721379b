"""Layer norm over the last axis, and group norm: rows less their mean, over their deviation."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.epilogue import Results, epilogue_reads
from schedules.gpu.launch import Buffer, Limits, Program, blocks
from schedules.gpu.primitives import rows

MOST_PARTS = 256  # work-items that share a row of a group norm: as large a work-group as nearly all devices have


@dataclass(frozen=True)
class LayerNorm(rows.OfRows):
    """out = epilogue((x - mean) / deviation * g + b), the deviation in a second pass because squares cancel."""

    eps: float = 1e-5

    NAME = "layer_norm"

    @property
    def channels(self) -> int:
        return self.c

    def channel(self, row: rows.Rows) -> str:
        """That of number v of a load."""
        return f"{row.column} + v"

    @property
    def reads(self) -> dict[str, Buffer]:
        own = {"x": self.x, "g": Buffer((self.channels,)), "b": Buffer((self.channels,))}
        return {**own, **epilogue_reads(self.epilogue, self.out, self.channels, bias="bias")}

    def program(self, limits: Limits, tiling: rows.Tiling) -> Program:
        row = self.rows(limits, tiling)
        away, channel = f"({row.value} - mean[0])", self.channel(row)
        results = Results(row.memory, row.lanes, row.value, channel, row.target, offset="bias")
        normal = f"{away} * scale[0] * g[{channel}] + b[{channel}]"
        body = [
            *row.summed("mean[0]", "first", row.value, loads=True),
            f"mean[0] = mean[0] * T.float32({1 / self.c!r})",
            *row.summed("scale[0]", "second", f"{away} * {away}"),
            f"scale[0] = T.rsqrt(scale[0] * T.float32({1 / self.c!r}) + T.float32({self.eps!r}))",
            row.stored(normal, results.through(self.epilogue.steps)),
        ]
        return self.swept(row, body, ["mean", "scale"])


@dataclass(frozen=True)
class GroupNorm(LayerNorm):
    """Of images: a group's channels lie one after the other, and are a row. `lead` is images and groups."""

    positions: int = 1  # of an image
    height: int = 1

    NAME = "group_norm"

    def offered(self, limits: Limits) -> list[rows.Tiling]:
        """There are few rows, and they are long."""
        loads = rows.power_of_two(blocks(self.c, rows.lanes_of(self.c)))
        return [rows.Tiling(1, min(MOST_PARTS, limits.work_group, loads)), *super().offered(limits)]

    @property
    def channels(self) -> int:
        return self.lead[1] * self.c // self.positions

    def channel(self, row: rows.Rows) -> str:
        groups, of_each = self.lead[1], self.c // self.positions
        return f"{row.row} % {groups} * {of_each} + ({row.column} + v) // {self.positions}"

    @property
    def x(self) -> Buffer:
        return Buffer(self._image, self.given)

    @property
    def out(self) -> Buffer:
        return Buffer(self._image, self.dtype)

    @property
    def _image(self) -> tuple[int, ...]:
        return self.lead[0], self.channels, self.height, self.positions // self.height
