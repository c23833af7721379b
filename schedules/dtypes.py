"""The types that a model can be computed in, one row each, and DLPack's words for all that lies in memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """What numbers are computed in: how they lie in memory, and how far a result may deviate from float32's.

    The tolerance is relative to the largest reference value of an output (at least 1). tf32 has the mantissa of
    float16, bfloat16 three bits less.
    """

    name: str
    stored: str
    bytes: int
    tolerance: float


DTYPES = {
    dtype.name: dtype
    for dtype in (
        Dtype("float32", "float32", 4, 1e-4),
        Dtype("tf32", "float32", 4, 5e-3),  # float32 of which tensor cores read the first 19 bits
        Dtype("float16", "float16", 2, 5e-3),
        Dtype("bfloat16", "bfloat16", 2, 4e-2),
    )
}
TOLERANCE = {name: dtype.tolerance for name, dtype in DTYPES.items()}
MOST_MOVES = 0.1  # of an original's answer by itself, beyond which a comparison with it would prove nothing

_DLPACK = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}


def stored_as(arithmetic: str) -> str:
    """How numbers of a type lie in memory."""
    return DTYPES[arithmetic].stored


def dlpack(dtype: str) -> tuple[int, int]:
    """DLPack's code and bits of a type in memory: (2, 32) for "float32"."""
    name = dtype.rstrip("0123456789")
    return _DLPACK[name], int(dtype.removeprefix(name) or 8)
