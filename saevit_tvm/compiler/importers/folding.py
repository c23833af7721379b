"""What depends on no input, computed by PyTorch: TVM would compile each such operator first, and take minutes."""

from __future__ import annotations

import math

import torch
import tvm
from tvm import relax

from saevit_tvm.compiler.importers.evaluate import RULES, plain_value

GROWTH = 1 << 20  # numbers: larger constants are kept only where they are no larger than what they are made of


def folded(mod: tvm.IRModule) -> tvm.IRModule:
    known: dict[relax.Var, relax.Expr] = {}

    @relax.expr_functor.mutator
    class Folded(relax.PyExprMutator):
        def visit_var_binding_(self, binding: relax.VarBinding) -> None:
            value = self.visit_expr(binding.value)
            found = _computed(value) if isinstance(value, relax.Call) else None
            if found is None:
                super().visit_var_binding_(binding)
            else:
                known[binding.var] = relax.const(found.contiguous().numpy())

        def visit_var_(self, var: relax.Var) -> relax.Expr:
            return known[var] if var in known else super().visit_var_(var)

        visit_dataflow_var_ = visit_var_

    mod["main"] = Folded().visit_expr(mod["main"])
    return mod


def _computed(call: relax.Call) -> torch.Tensor | None:
    rule = RULES.get(call.op.name.removeprefix("relax.")) if isinstance(call.op, tvm.ir.Op) else None
    if rule is None or not isinstance(call.ty, relax.TensorType) or relax.analysis.free_vars(call):
        return None
    given = [math.prod(map(int, each.ty.shape)) for each in call.args if isinstance(each.ty, relax.TensorType)]
    if not given or math.prod(map(int, call.ty.shape)) > max(GROWTH, *given):
        return None
    with torch.no_grad():
        found = rule([plain_value(each) for each in call.args], call.attrs)
    return found if isinstance(found, torch.Tensor) else None
