"""From short numbers to float32 and back, where what follows computes in the other."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.launch import Buffer, Kernel, Limits, Program, blocks, nest
from schedules.gpu.primitives.head import Tiling, groups


@dataclass(frozen=True)
class Cast(Kernel):
    """out = x, stored in another dtype."""

    extents: tuple[int, ...]
    given: str
    dtype: str

    NAME = "cast"
    KNOBS = Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": Buffer(self.extents, self.given)}

    @property
    def out(self) -> Buffer:
        return Buffer(self.extents, self.dtype)

    def offered(self, limits: Limits) -> list[Tiling]:
        return groups(limits)

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        memory, at = self.memory(limits), f"bx * {tiling.group} + tx"
        moved = memory.store("out", at, memory.load("x", at))
        grid = (blocks(self.out.size, tiling.group),)
        return Program(grid=grid, group=(tiling.group,), body=nest(f"if {at} < {self.out.size}:", moved))
