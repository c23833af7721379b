"""What SAA computes, whatever computes it: windows of r x r positions, a token each, and heads that attend to them."""

from __future__ import annotations

from dataclasses import dataclass

NO_SHARE = -1e30  # the saliency of positions beyond the image
TAPS = 9  # of the convolution that gives the saliency


@dataclass(frozen=True)
class SAAShape:
    n: int
    h: int
    w: int
    c: int
    heads: int
    r: int
    eps: float = 1e-5
    scale: float = 0.25

    @property
    def rows(self) -> int:
        return -(-self.h // self.r)

    @property
    def columns(self) -> int:
        return -(-self.w // self.r)

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def dim(self) -> int:
        return self.c // self.heads

    @property
    def flops(self) -> int:
        sampled = self.h * self.w * self.c * (TAPS + 1 + 1) if self.r > 1 else 0
        return 2 * self.n * (sampled + self.tokens * self.c * (4 * self.c + 2 * self.tokens))
