"""Sums over channels, position by position: work-items share a position's channels and meet in local memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from schedules.gpu.epilogue import gelu
from schedules.gpu.launch import Buffer, Kernel, Limits, Program, blocks, nest


@dataclass(frozen=True)
class Tiling:
    """Work-groups of `side` positions, each of which `parts` work-items share."""

    side: int
    parts: int


def shares(positions: int, limits: Limits) -> list[Tiling]:
    """Ways to share positions, the default first."""
    # Where local memory is main memory, every share is a number written and read again: few, if the positions alone
    # keep the device busy.
    few = not limits.local_is_fast and positions >= 4 * limits.wave
    parts = 4 if few else 16
    default = Tiling(limits.wave // parts * (1 if few else 2), parts)
    return [default, *(Tiling(*knobs) for knobs in product((4, 8, 16, 32), (4, 8, 16, 32)))]


@dataclass(frozen=True)
class CommonPart(Kernel):
    """out = gelu(w . x + b): what all channels of a position have in common."""

    n: int
    c: int
    h: int
    w: int
    dtype: str = "float32"

    NAME = "common_part"
    KNOBS = Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": Buffer((self.n, self.c, self.h, self.w), self.dtype), "w": Buffer((self.c,)), "b": Buffer((1,))}

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, 1, self.h, self.w))

    def offered(self, limits: Limits) -> list[Tiling]:
        return shares(self.h * self.w, limits)

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        side, parts, area = tiling.side, tiling.parts, self.h * self.w
        position, channel = f"(bx * {side} + tx)", f"(i * {parts} + ty)"
        element = self.memory(limits).load("x", f"(by * {self.c} + {channel}) * {area} + {position}")
        share = nest(
            f"for i in range({blocks(self.c, parts)}):",
            nest(f"if {channel} < {self.c}:", f"acc[0] = acc[0] + {element} * w[{channel}]"),
        )
        total = nest(f"for i in range({parts}):", f"acc[0] = acc[0] + part[i * {side} + tx]")
        body = [
            "acc[0] = T.float32(0)",
            nest(f"if {position} < {area}:", share),
            f"part[ty * {side} + tx] = acc[0]",
            nest(
                f"if ty == 0 and {position} < {area}:",
                "acc[0] = b[0]",
                total,
                f"out[by * {area} + {position}] = {gelu('acc[0]')}",
            ),
        ]
        return Program(
            grid=(blocks(area, side), self.n),
            group=(side, parts),
            body="\n".join(body),
            private={"acc": 1},
            shared={"part": side * parts},
        )
