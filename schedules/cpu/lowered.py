"""What a generator returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx


@dataclass(frozen=True)
class Lowered:
    """`func(x, *constants, out)`: the loops, the packed weights they read, and the work they do."""

    func: tirx.PrimFunc
    constants: list[np.ndarray]
    flops: int
