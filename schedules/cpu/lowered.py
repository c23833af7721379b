"""What a generator is, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tvm import tirx

from schedules.cpu.isa import Isa


@dataclass(frozen=True)
class Lowered:
    """`func(x, *constants, out)`: the loops, the packed weights they read, and the work they do."""

    func: tirx.PrimFunc
    constants: list[np.ndarray]
    flops: int


class TiledRegion(Protocol):
    """One region of one shape, tiled, for one vector unit."""

    def function(self) -> tirx.PrimFunc: ...

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]: ...


def any_shape(_shape: Any) -> bool:
    """What a generator accepts that declines nothing."""
    return True


def stored(func: tirx.PrimFunc, constants: list[np.ndarray]) -> list[np.ndarray]:
    """The packed weights in the types that the function reads them in, rounded once."""
    params = func.params[1:-1]
    return [np.asarray(value, str(param.dtype)) for value, param in zip(constants, params, strict=True)]


def generator(
    tiled: Callable[[Any, Isa, Any], TiledRegion], default_tiling: Callable[..., Any]
) -> Callable[..., Lowered]:
    """lower(shape, weights, isa, tiling=None, threads=1): how every region becomes loops."""

    def lower(
        shape: Any, weights: dict[str, np.ndarray], isa: Isa, tiling: Any | None = None, threads: int = 1
    ) -> Lowered:
        generated = tiled(shape, isa, tiling or default_tiling(shape, isa, threads))
        func = generated.function()
        return Lowered(func, stored(func, generated.constants(weights)), shape.flops)

    return lower
