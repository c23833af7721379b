"""What a convolution is to compute, and how its work may be cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from schedules.cpu.primitives.windows import Windows
from schedules.spec import Epilogue

BIAS = Epilogue(("bias",))


@dataclass(frozen=True, kw_only=True)
class ConvShape(Windows):
    k: int
    epilogue: Epilogue = field(default=BIAS)
    gates: tuple[str, ...] = ()
    parts: int = 1  # groups of channels, each of which sees its own channels of the input
    exact: bool = False  # the weights are whole numbers, and so are to be the sums
    channels_first: bool = False  # the input is a picture, as it comes from outside: of float32 in any case

    @property
    def image(self) -> tuple[int, ...]:
        n, h, w, c = self.n, self.h, self.w, self.c
        return (n, c, h, w) if self.channels_first else (n, h, w, c)

    @property
    def line(self) -> int:
        """Numbers of a row of the input, with what is padded."""
        return (self.w + self.padding[1] + self.padding[3]) * self.c

    @property
    def depth(self) -> int:
        return math.prod(self.kernel) * self.c // self.parts

    @property
    def columns(self) -> int:
        """Channels of a group's result."""
        return self.k // self.parts

    @property
    def result(self) -> tuple[int, ...]:
        return self.n, self.out_h, self.out_w, self.k

    @property
    def in_place(self) -> bool:
        """Whether a window is one pixel of the input as it lies there: nothing is to be copied."""
        plain = self.kernel == self.strides == (1, 1) and not any(self.padding)
        return plain and not self.channels_first

    @property
    def flops(self) -> int:
        return 2 * self.n * self.out_h * self.out_w * self.k * self.depth


@dataclass(frozen=True)
class Tiling:
    """`bands` x `groups` tasks a picture (rows x channels), `chunk` rows of results at a time, the register tile.

    With a `square`, results are computed by Winograd in squares of so many a side: `bands` tasks, `chunk` squares
    at a time.
    """

    bands: int
    groups: int
    chunk: int
    rows: int
    vectors: int
    unroll: int
    square: int = 0
