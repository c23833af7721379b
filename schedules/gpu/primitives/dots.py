"""gelu(w . x + b) for every column that a work-group multiplies by a matrix: its inputs are in local memory anyway.

One more output channel would cost tensor cores sixteen. So work-items sum these products up themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.epilogue import gelu
from schedules.gpu.launch import nest
from schedules.gpu.primitives.fragments import WARP


@dataclass(frozen=True)
class Dots:
    """Of `broad` columns and `depth` terms, of which `terms` are in near_right at a time, `stride` numbers apart.

    Where there are more of the `items` than columns, several share one; where there are fewer, one has several.
    """

    depth: int
    terms: int
    stride: int
    broad: int
    items: int

    @property
    def sharers(self) -> int:
        return max(1, self.items // self.broad)

    @property
    def turns(self) -> int:
        return max(1, self.broad // self.items)

    @property
    def private(self) -> dict[str, int]:
        return {"dot": self.turns}

    @property
    def shared(self) -> dict[str, int]:
        parts = {"near_dots": self.sharers * self.broad} if self.sharers > 1 else {}
        return {**parts, "near_common": self.broad}

    @property
    def column(self) -> str:
        return f"((e * {self.items} + {self.item}) % {self.broad})"

    @property
    def item(self) -> str:
        return f"(ty * {WARP} + tx)"

    def cleared(self) -> str:
        return self._each("dot[e] = T.float32(0)")

    def added(self, step: str) -> str:
        """The products of the terms of a step; beyond the last term, inputs are zeros and there are no weights."""
        mine = self.terms // self.sharers
        term = f"({self.item} // {self.broad} * {mine} + q)" if self.sharers > 1 else "q"
        whole = f"({step} * {self.terms} + {term})"
        weight = f"dec_w[{whole}]"
        if self.depth % self.terms:
            weight = f"T.if_then_else({whole} < {self.depth}, {weight}, T.float32(0))"
        number = f'T.Cast("float32", near_right[{term} * {self.stride} + {self.column}])'
        return nest(f"for q in range({mine}):", self._each(f"dot[e] = dot[e] + {weight} * {number}"))

    def finished(self, barrier: str) -> list[str]:
        """What is left in near_common, by column."""
        result = f"near_common[{self.column}] = {gelu('dot[e]')}"
        if self.sharers == 1:
            return [self._each("dot[e] = dot[e] + dec_b[0]", result), barrier]
        shared = f"near_dots[{self.item} // {self.broad} * {self.broad} + {self.column}] = dot[e]"
        part = f"near_dots[p * {self.broad} + {self.column}]"
        total = nest(f"for p in range({self.sharers}):", f"dot[e] = dot[e] + {part}")
        done = nest(f"if {self.item} < {self.broad}:", "dot[e] = dec_b[0]", total, result)
        return [self._each(shared), barrier, self._each(done), barrier]

    def _each(self, *statements: str) -> str:
        return nest(f"for e in T.unroll({self.turns}):", *statements)
