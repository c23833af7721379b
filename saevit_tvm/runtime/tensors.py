"""What goes into a library and what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Inputs = tuple[np.ndarray, ...]  # of one inference
LEVELS = 256  # of a byte
MOST_CHANNELS = 4  # of a picture


class TensorSpec(NamedTuple):
    """What an input or output looks like."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    below: int | None = None  # of whole numbers that may be places in a table

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def entry(self) -> dict[str, Any]:
        """The same in a manifest."""
        bound = {} if self.below is None else {"below": self.below}
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, **bound}


def specs_of(entries: Iterable[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    """A manifest's inputs or outputs."""
    return tuple(TensorSpec(each["name"], tuple(each["shape"]), each["dtype"], each.get("below")) for each in entries)


def pictures(shape: Sequence[int]) -> int:
    """How many pictures an input of this shape holds; a single number is for one."""
    return shape[0] if shape else 1


def shown(shape: Sequence[int]) -> str:
    """A shape in words."""
    return "x".join(map(str, shape)) or "one number"


def drawn(specs: Iterable[TensorSpec], stream: np.random.RandomState) -> Inputs:
    """Random inputs, from a stream that is the same on every machine and with every numpy."""
    return tuple(_drawn(spec, stream) for spec in specs)


def _drawn(spec: TensorSpec, stream: np.random.RandomState) -> np.ndarray:
    if spec.dtype.startswith("float"):
        return np.asarray(stream.standard_normal(spec.shape), spec.dtype)
    levels = 2 if spec.dtype == "bool" else spec.below or LEVELS
    return np.asarray(stream.randint(0, levels, spec.shape), spec.dtype)


def layout(extents: Sequence[int | None]) -> str:
    """How an image of four dimensions lies: channels last where the last axis has few, and the second has not."""
    few = [extent is not None and extent <= MOST_CHANNELS for extent in extents]
    return "NHWC" if few[3] and not few[1] else "NCHW"
