"""What depends on no input, computed by PyTorch: TVM would compile each such operator first, and take minutes."""

from __future__ import annotations

import math
from typing import Any

import torch
import tvm
from tvm import relax

from saevit_tvm.compiler.importers.evaluate import RULES, plain_value

GROWTH = 1 << 20  # numbers: larger constants are kept only where they are no larger than what they are made of
# They stay where they are: patterns over the graph know a weight by its own shape.
VIEWS = ("broadcast_to", "expand_dims", "permute_dims", "reshape", "squeeze", "strided_slice")


def folded(mod: tvm.IRModule) -> tvm.IRModule:
    known: dict[relax.Var, torch.Tensor] = {}
    constants: dict[relax.Var, relax.Expr] = {}

    @relax.expr_functor.mutator
    class Folded(relax.PyExprMutator):
        def visit_var_binding_(self, binding: relax.VarBinding) -> None:
            found = _computed(binding.value, known)
            if found is not None:
                known[binding.var] = found
            if found is None or _name(binding.value) in VIEWS:
                super().visit_var_binding_(binding)
            else:
                dtype = str(found.dtype).removeprefix("torch.")
                constants[binding.var] = relax.const(found.contiguous().numpy(), dtype)

        def visit_var_(self, var: relax.Var) -> relax.Expr:
            return constants[var] if var in constants else super().visit_var_(var)

        visit_dataflow_var_ = visit_var_

    mod["main"] = Folded().visit_expr(mod["main"])
    return mod


def _name(expr: relax.Expr) -> str:
    is_operator = isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op)
    return expr.op.name.removeprefix("relax.") if is_operator else ""


def _computed(call: relax.Expr, known: dict[relax.Var, torch.Tensor]) -> torch.Tensor | None:
    rule = RULES.get(_name(call))
    if rule is None or not isinstance(call.ty, relax.TensorType):
        return None
    if any(var not in known for var in relax.analysis.free_vars(call)):
        return None
    given = [math.prod(map(int, each.ty.shape)) for each in call.args if isinstance(each.ty, relax.TensorType)]
    if not given or math.prod(map(int, call.ty.shape)) > max(GROWTH, *given):
        return None
    with torch.no_grad():
        found = rule([_value(each, known) for each in call.args], call.attrs)
    return found if isinstance(found, torch.Tensor) else None


def _value(expr: relax.Expr, known: dict[relax.Var, torch.Tensor]) -> Any:
    if isinstance(expr, relax.Tuple):
        return tuple(_value(each, known) for each in expr.fields)
    return known[expr] if isinstance(expr, relax.Var) else plain_value(expr)
