"""The head: the mean over all positions, then a linear layer.

Every work-group computes the mean for itself and keeps it in local memory: it is small beside the weights, which are
read once.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.launch import Buffer, Kernel, Limits, Program, blocks, nest


@dataclass(frozen=True)
class Tiling:
    """Work-items of a work-group."""

    group: int


def groups(limits: Limits) -> list[Tiling]:
    """The smallest work-group that fills the device, then all others."""
    sizes = (32, 64, 128, 256)
    default = [size for size in sizes if size >= limits.wave][:1]
    return [Tiling(size) for size in (*default, *sizes)]


@dataclass(frozen=True)
class Head(Kernel):
    """out = mean(x) @ w + b, in float32 however x is stored."""

    n: int
    h: int
    w: int
    c: int
    k: int
    dtype: str = "float32"

    NAME = "head"
    KNOBS = Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        image = Buffer((self.n, self.c, self.h, self.w), self.dtype)
        return {"x": image, "w": Buffer((self.c, self.k), self.dtype), "b": Buffer((self.k,))}

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, self.k))

    def offered(self, limits: Limits) -> list[Tiling]:
        return groups(limits)

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        group, area, memory = tiling.group, self.h * self.w, self.memory(limits)
        channel, column = f"(i * {group} + tx)", f"(bx * {group} + tx)"
        element = memory.load("x", f"(by * {self.c} + {channel}) * {area} + p")
        weight = memory.load("w", f"i * {self.k} + {column}")
        pool = nest(
            f"if {channel} < {self.c}:",
            "acc[0] = T.float32(0)",
            nest(f"for p in range({area}):", f"acc[0] = acc[0] + {element}"),
            f"mean[{channel}] = acc[0] * T.float32({1 / area!r})",
        )
        linear = nest(
            f"if {column} < {self.k}:",
            f"acc[0] = b[{column}]",
            nest(f"for i in range({self.c}):", f"acc[0] = acc[0] + mean[i] * {weight}"),
            f"out[by * {self.k} + {column}] = acc[0]",
        )
        return Program(
            grid=(blocks(self.k, group), self.n),
            group=(group,),
            body="\n".join([nest(f"for i in range({blocks(self.c, group)}):", pool), linear]),
            private={"acc": 1},
            shared={"mean": self.c},
        )
