"""What is computed from constants alone is computed now, and most models have none of that.

TVM's pass makes loops of every operator to see whether it reads constants only: a second of a build, for nothing.
"""

from __future__ import annotations

import tvm
from tvm import relax


def _is_known(expr: relax.Expr) -> bool:
    if isinstance(expr, relax.Tuple):
        return all(map(_is_known, expr.fields))
    return not isinstance(expr, (relax.Var, relax.Call, relax.TupleGetItem))


def _may_fold(call: relax.Expr) -> bool:
    if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
        return False
    if call.op.name.endswith("_like"):  # it reads nothing but a shape
        return True
    args = call.args[1:] if call.op.name == "relax.call_tir" else call.args
    shapes = any(isinstance(arg, relax.Var) and isinstance(arg.ty, relax.ShapeType) for arg in args)
    return shapes or all(map(_is_known, args))


@tvm.ir.transform.module_pass(opt_level=0, name="FoldConstants")
class FoldConstants:
    """TVM's FoldConstant where a call might fold, and where none does, what else it does: drop what nobody uses."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        found: list[relax.Expr] = []

        def visit(expr: relax.Expr) -> None:
            if _may_fold(expr):
                found.append(expr)

        for _name, func in mod.functions_items():
            if isinstance(func, relax.Function):
                relax.analysis.post_order_visit(func, visit)
        return relax.transform.FoldConstant()(mod) if found else relax.transform.DeadCodeElimination()(mod)
