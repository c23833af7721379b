"""Indexing with tensors. TVM takes their outer product where some axes are left whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, argument, arguments, constant, indices, shape

OPERATORS = ("index.Tensor",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    """The indexed axes, side by side, become one; a tensor of positions on it is taken."""
    x, given = arguments(node, op)["self"], arguments(node, op)["indices"]
    places = {axis: index for axis, index in enumerate(given) if index is not None}
    if any(str(index.ty.dtype) == "bool" for index in places.values()):
        raise ValueError("a mask as an index gives a size that depends on the picture")
    extents, axes = shape(x), list(places)
    together = axes == list(range(axes[0], axes[-1] + 1))
    first = axes[0] if together else 0
    if not together:
        order = [*axes, *(axis for axis in range(len(extents)) if axis not in places)]
        x, extents = op.permute_dims(x, order), tuple(extents[axis] for axis in order)
    lengths = extents[first : first + len(axes)]
    known = [constant(index) for index in argument(node, "indices") if index is not None]
    if all(each is not None for each in known):
        place: Any = indices(_flat_place(known, lengths))
    else:
        place = _computed_place(op, list(places.values()), lengths)
    flat = (*extents[:first], math.prod(lengths), *extents[first + len(axes) :])
    return op.take(op.reshape(x, flat), place, axis=first)


def _flat_place(known: list[Any], lengths: tuple[int, ...]) -> np.ndarray:
    wrapped = [np.where(each < 0, each + length, each) for each, length in zip(known, lengths, strict=True)]
    return np.ravel_multi_index(tuple(np.broadcast_arrays(*wrapped)), lengths)


def _computed_place(op: Emitter, given: list[relax.Expr], lengths: tuple[int, ...]) -> relax.Expr:
    place = relax.const(0, "int64")
    for index, length in zip(given, lengths, strict=True):
        index, whole = op.astype(index, "int64"), relax.const(length, "int64")
        wrapped = op.where(op.less(index, relax.const(0, "int64")), op.add(index, whole), index)
        place = op.add(op.multiply(place, whole), wrapped)
    return place
