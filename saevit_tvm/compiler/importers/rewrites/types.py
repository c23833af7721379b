"""Numbers of two types, functions of whole numbers, and factors of a sum.

TVM takes a number for one of the tensor's type, knows such functions of fractions only, and reads no factor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saevit_tvm.compiler.importers.rewrites import operator


def _is_settled(value: Any, dtype: torch.dtype) -> bool:
    """Nothing is to be done about a number that a tensor of the type can hold."""
    if isinstance(value, Tensor):
        return value.dtype == dtype
    return dtype.is_floating_point or not isinstance(value, float)


def _alike(op: Any, a: Any, b: Any) -> Any:
    dtype = torch.result_type(a, b)
    if dtype.is_complex or all(_is_settled(each, dtype) for each in (a, b)):
        return NotImplemented
    return op(*(each.to(dtype) if isinstance(each, Tensor) else each for each in (a, b)))


def _decided(op: Any, a: Any, b: Any) -> Any:
    """Decisions are no numbers: TVM has no code for what it takes for their product."""
    tensors = [each for each in (a, b) if isinstance(each, Tensor) and each.dtype == torch.bool]
    return op(a, b) if len(tensors) == 2 else NotImplemented


def _sum(op: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    if op is operator("add.Tensor") and (found := _decided(torch.logical_or, a, b)) is not NotImplemented:
        return found
    return _alike(op, a, b) if alpha == 1 else op(a, b * alpha)


def _product(a: Any, b: Any) -> Any:
    found = _decided(torch.logical_and, a, b)
    return _alike(operator("mul.Tensor"), a, b) if found is NotImplemented else found


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Any:
    return _alike(partial(torch.where, condition), a, b)


def _joined(tensors: list[Tensor], dim: int = 0) -> Any:
    """A tensor of one axis without numbers may be anywhere."""
    dtype = tensors[0].dtype
    for each in tensors[1:]:
        dtype = torch.promote_types(dtype, each.dtype)
    if dtype.is_complex or all(each.dtype == dtype for each in tensors):
        return NotImplemented
    return torch.cat([each.to(dtype) for each in tensors], dim)


def _bounded(x: Tensor, min: Any = None, max: Any = None) -> Any:
    """Whole numbers with a bound on one side: for TVM the other one is infinite, which is none of them."""
    if x.dtype.is_floating_point:
        return NotImplemented
    bounds = [each for each in (min, max) if each is not None]
    dtype = torch.float32 if any(isinstance(each, float) for each in bounds) else torch.result_type(x, 0)
    if x.dtype != dtype:
        return torch.clamp(x.to(dtype), min, max)
    x = x if min is None else torch.maximum(x, torch.full((), min, dtype=dtype))
    return x if max is None else torch.minimum(x, torch.full((), max, dtype=dtype))


BINARY = (
    *("div.Tensor", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "remainder.Tensor"),
    *("remainder.Scalar", "fmod.Tensor", "fmod.Scalar", "maximum.default", "minimum.default", "atan2.default"),
    *("eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor"),
    *("eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar"),
)


# What gives a fraction of a whole number.
FRACTIONAL = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "exp", "expm1", "log", "log10", "log1p"),
    *("log2", "reciprocal", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh"),
)


def _fraction(op: Any, x: Tensor) -> Any:
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return NotImplemented
    return op(x.to(torch.get_default_dtype()))


def _shifted(x: Tensor, count: Any, *, left: bool) -> Any:
    if x.dtype.is_floating_point or not isinstance(count, int):
        return NotImplemented
    return x * 2**count if left else torch.div(x, 2**count, rounding_mode="floor")


REWRITES: dict[str, Callable[..., Any]] = {
    **{name: partial(_alike, operator(name)) for name in BINARY},
    **{name: partial(_sum, operator(name)) for name in ("add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar")},
    **{f"{name}.default": partial(_fraction, operator(f"{name}.default")) for name in FRACTIONAL},
    "__lshift__.Scalar": partial(_shifted, left=True),
    "__rshift__.Scalar": partial(_shifted, left=False),
    "cat.default": _joined,
    "clamp.default": _bounded,
    "mul.Tensor": _product,
    "where.self": _where,
}
