"""Windows that go over an image: what convolutions and pooling have in common."""

from __future__ import annotations

from dataclasses import dataclass


class Spans:
    """What follows from a window's size and way."""

    h: int
    w: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]  # above, left, below, right
    dilation: tuple[int, int]

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of the input that a result sees, with those that dilation leaves out."""
        (high, wide), (down, across) = self.kernel, self.dilation
        return (high - 1) * down + 1, (wide - 1) * across + 1

    @property
    def height(self) -> int:
        return (self.h + self.padding[0] + self.padding[2] - self.span[0]) // self.strides[0] + 1

    @property
    def width(self) -> int:
        return (self.w + self.padding[1] + self.padding[3] - self.span[1]) // self.strides[1] + 1

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


@dataclass(frozen=True)
class Windows(Spans):
    """Channel by channel."""

    n: int
    c: int
    h: int
    w: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
