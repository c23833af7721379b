"""Depthwise 3x3 with bias and GELU: a work-item a position, a work-group within one channel."""

from __future__ import annotations

from schedules.gpu.launch import Launch, Limits, blocks, gelu, kernel


def depthwise(n: int, c: int, h: int, w: int, limits: Limits, *, x: str, out: str) -> Launch:
    """out = gelu(dw_w * x + dw_b), same size, zeros around."""
    area, size = h * w, limits.wave
    at = f"(bz * {c} + by) * {area} + bx * {size} + tx"
    body = f"""
if bx * {size} + tx < {area}:
    acc[0] = dw_b[by]
    for dy in T.unroll(3):
        for dx in T.unroll(3):
            if {_inside(size, h, w)}:
                acc[0] = acc[0] + dw_w[(dy * 3 + dx) * {c} + by] * {x}[{at} + (dy - 1) * {w} + dx - 1]
    {out}[{at}] = {gelu("acc[0]")}
"""
    return kernel(
        "depthwise",
        {x: (n, c, h, w), "dw_w": (3, 3, c), "dw_b": (c,)},
        out,
        (n, c, h, w),
        grid=(blocks(area, size), c, n),
        group=(size,),
        body=body,
        private={"acc": 1},
    )


def _inside(size: int, h: int, w: int) -> str:
    row, column = f"(bx * {size} + tx) // {w} + dy", f"(bx * {size} + tx) % {w} + dx"
    return f"{row} >= 1 and {row} <= {h} and {column} >= 1 and {column} <= {w}"
