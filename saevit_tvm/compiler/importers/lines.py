"""An axis each of whose numbers is a sum of shares of the numbers of an axis: resizing, and whatever is linear."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, indices, shape

FEW = 16  # numbers of a line that are added up one by one; more are a product with a matrix


def mixed(op: Emitter, x: relax.Expr, axis: int, shares: np.ndarray) -> relax.Expr:
    """`shares`: [numbers of the result, numbers of a line]."""
    most = max(1, int((shares != 0).sum(1).max()))
    if most > FEW:
        return _product(op, x, axis, shares)
    total = None
    for places, share in _in_turns(shares, most):
        value = op.take(x, indices(places), axis=axis)
        if not np.all(share == 1.0):
            wide = share.astype("float32").reshape(-1, *([1] * (len(shape(x)) - 1 - axis)))
            value = op.multiply(value, relax.const(wide, dtype(x)))
        total = value if total is None else op.add(total, value)
    return total


def _in_turns(shares: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first number that each result is made of and its share, then the second, and so on.

    A result of fewer numbers reads its first one again, for nothing.
    """
    numbers = [np.flatnonzero(row) for row in shares]
    for k in range(most):
        places = [row[k] if k < len(row) else (row[0] if len(row) else 0) for row in numbers]
        there = np.array([k < len(row) for row in numbers])
        yield np.array(places), np.where(there, shares[np.arange(len(shares)), places], 0.0)


def _product(op: Emitter, x: relax.Expr, axis: int, shares: np.ndarray) -> relax.Expr:
    rank = len(shape(x))
    if axis == rank - 2:
        return op.matmul(relax.const(np.ascontiguousarray(shares), dtype(x)), x)
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    turned = x if axis == rank - 1 else op.permute_dims(x, order)
    found = op.matmul(turned, relax.const(np.ascontiguousarray(shares.T), dtype(x)))
    return found if axis == rank - 1 else op.permute_dims(found, order)
