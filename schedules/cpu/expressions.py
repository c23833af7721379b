"""The polynomials of `math` in kernels of TVM's operators, where LLVM would call the C library for every number."""

from __future__ import annotations

from typing import Any

from tvm import ir, tirx
from tvm_ffi import structural_map

from schedules.activations import activated
from schedules.cpu import math
from schedules.cpu.builder import Builder, Expr
from schedules.cpu.epilogue import Vectors


class Names(Builder):
    """A builder within an expression: there are no statements, and what has a name is bound around the result."""

    def __init__(self) -> None:
        super().__init__()
        self._named: list[tuple[tirx.Var, Expr]] = []

    def bind(self, name: str, value: Expr) -> Expr:
        var = tirx.Var(name, value.ty)
        self._named.append((var, value))
        return var

    compute_once = bind

    def around(self, result: Expr) -> Expr:
        for var, value in reversed(self._named):
            result = tirx.Let(var, value, result)
        return result


def _exp(b: Builder, x: Expr) -> Expr:
    """To nothing where it is next to nothing: whoever divides by it or takes its logarithm sees the difference."""
    return tirx.Select(x < tirx.const(-87.0, "float32"), tirx.const(0.0, "float32"), math.exp(b, x))


FUNCTIONS = {
    "tirx.exp": _exp,
    "tirx.sigmoid": lambda b, x: activated("sigmoid", x, Vectors(b)),
    "tirx.tanh": lambda b, x: activated("tanh", x, Vectors(b)),
    "tirx.erf": math.erf,
}


def quick(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The same kernel; loops over one float32 function of numbers become loops over vectors."""
    return structural_map(func, (ir.Call, _replaced))


def _replaced(call: Any) -> Any:
    name = getattr(call.op, "name", None)
    if name not in FUNCTIONS or str(call.ty) != "float32":
        return call
    b = Names()
    return b.around(FUNCTIONS[name](b, b.bind("x", call.args[0])))
