"""How many multiply-adds a graph asks for, and which of them no kernel of ours took."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from saevit_tvm.compiler.passes.rewriting import shape_of
from schedules.kernels import declared


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one inference, those of operators that are left to TVM's rules, and calls of their kernels."""

    multiply_adds: int = 0
    left_to_rules: int = 0
    kernels_left: dict[str, int] = field(default_factory=dict)


def multiply_adds(mod: tvm.IRModule) -> int:
    """Of all operators of a graph that multiply and sum up; declared kernels are none of them."""
    total = 0

    def visit(expr: relax.Expr) -> None:
        nonlocal total
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            if expr.op.name in COUNTED:
                total += COUNTED[expr.op.name](expr)
            elif expr.op.name == "relax.call_tir":
                total += _in_loops(mod[expr.args[0]])

    relax.analysis.post_order_visit(mod["main"], visit)
    return total


def _in_loops(func: tirx.PrimFunc) -> int:
    """Of an operator that came with its loops, as ONNX's Einsum does: sums of products. A declaration has none."""
    if declared(func):
        return 0
    schedule = s_tir.Schedule(func)
    blocks = map(schedule.get, schedule.get_child_blocks(schedule.get_sblock("root")))
    return sum(math.prod(int(var.dom.extent) for var in block.iter_vars) for block in blocks if _sums_products(block))


def _sums_products(block: s_tir.SBlock) -> bool:
    added = getattr(block.body, "value", None)
    return block.init is not None and isinstance(added, tirx.Add) and isinstance(added.b, tirx.Mul)


def _product(call: relax.Call) -> int:
    return math.prod(shape_of(call)) * shape_of(call.args[0])[-1]


def _convolution(call: relax.Call) -> int:
    """Each result takes a window of every input channel of its group; weights lie with the results' channel first."""
    return math.prod(shape_of(call)) * math.prod(shape_of(call.args[1])[1:])


def _transposed(call: relax.Call) -> int:
    """Each input goes to a window of every output channel of its group; weights lie with the input's channel first."""
    return math.prod(shape_of(call.args[0])) * math.prod(shape_of(call.args[1])[1:])


def _attention(call: relax.Call) -> int:
    (n, t, heads, d), (_, s, _, dv) = shape_of(call.args[0]), shape_of(call.args[2])
    return n * t * s * heads * (d + dv)


COUNTED: dict[str, Callable[[Any], int]] = {
    "relax.matmul": _product,
    "relax.nn.attention": _attention,
    "relax.nn.attention_bias": _attention,
    **{f"relax.nn.conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"relax.nn.conv{n}d_transpose": _transposed for n in (1, 2, 3)},
}
