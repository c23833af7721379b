"""Sums over channels, position by position: work-items share a position's channels and meet in local memory."""

from __future__ import annotations

from schedules.gpu.launch import Launch, Limits, blocks, gelu, kernel

SIDE = 8  # positions of a work-group
PARTS = 16  # work-items that share a position


def common_part(n: int, e: int, h: int, w: int, limits: Limits, *, x: str, out: str) -> Launch:
    """out = gelu(dec_w . x + dec_b): what all channels of a position have in common."""
    area = h * w
    body = f"""
acc[0] = T.float32(0)
if bx * {SIDE} + tx < {area}:
    for i in range({blocks(e, PARTS)}):
        if i * {PARTS} + ty < {e}:
            acc[0] = acc[0] + {x}[(by * {e} + i * {PARTS} + ty) * {area} + bx * {SIDE} + tx] * dec_w[i * {PARTS} + ty]
part[ty * {SIDE} + tx] = acc[0]
if ty == 0 and bx * {SIDE} + tx < {area}:
    acc[0] = dec_b[0]
    for i in range({PARTS}):
        acc[0] = acc[0] + part[i * {SIDE} + tx]
    {out}[by * {area} + bx * {SIDE} + tx] = {gelu("acc[0]")}
"""
    return kernel(
        "common_part",
        {x: (n, e, h, w), "dec_w": (e,), "dec_b": (1,)},
        out,
        (n, 1, h, w),
        grid=(blocks(area, SIDE), n),
        group=(SIDE, PARTS),
        body=body,
        private={"acc": 1},
        shared={"part": SIDE * PARTS},
    )
