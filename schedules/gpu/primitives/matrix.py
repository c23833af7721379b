"""The weights of a product of matrices, of which a work-item needs some neighbouring output channels at a time."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.launch import TEXEL, Memory, blocks, nest


@dataclass(frozen=True)
class Matrix:
    """The parameter `w`, `k` numbers a row, read `channels` at a time: directly, through an `image` or local memory.

    A work-group `group` has `items` work-items `item` beside each other along the channels, and `size` in all, which
    are numbered by `number`. Numbers become `factor` as they are read.
    """

    memory: Memory
    k: int
    channels: int
    group: str
    item: str
    items: int
    number: str
    size: int
    staged: int
    image: int
    factor: str

    @property
    def width(self) -> int:
        """Output channels of a work-group."""
        return self.items * self.channels

    @property
    def column(self) -> str:
        """The work-item's place along the channels."""
        return f"{self.group} * {self.items} + {self.item}"

    @property
    def channel(self) -> str:
        """The first of the work-item's channels."""
        return f"({self.column}) * {self.channels}"

    def staging(self, first: str) -> str:
        """`staged` rows from the first on into local memory; all work-items of the group bring some."""
        count = self.staged * self.width
        at = f"(e * {self.size} + {self.number})"
        channel = f"({self.group} * {self.width} + {at} % {self.width})"
        brought = f"near[{at}] = {self.memory.load('w', f'({first} + {at} // {self.width}) * {self.k} + {channel}')}"
        return nest(
            f"for e in range({blocks(count, self.size)}):",
            nest(f"if {at} < {count} and {channel} < {self.k}:", brought),
        )

    def load(self, row: str, near: str) -> str:
        """The work-item's channels of a row into `ws`; of those in local memory it is the row `near`."""
        if self.image:
            texel = f"{row} * {self.k // TEXEL} + ({self.column}) * {self.channels // TEXEL}"
            return self.memory.load_texels("ws", "w", texel, self.channels, self.factor)
        if not self.staged:
            return self.memory.load_lanes(
                "ws", "0", "w", f"{row} * {self.k} + {self.channel}", self.channels, self.factor
            )
        number = f"near[{near} * {self.width} + {self.item} * {self.channels} + j]"
        number = f'T.Cast("float16", {number})' if self.factor == "float16" else number
        return nest(f"for j in T.vectorized({self.channels}):", f"ws[j] = {number}")
