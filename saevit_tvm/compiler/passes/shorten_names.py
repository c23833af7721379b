"""A kernel that was fused of very many operators has all their names: a driver that keeps a file by that name ends."""

from __future__ import annotations

import tvm
from tvm import relax, tirx

LONGEST = 80  # letters


@tvm.ir.transform.module_pass(opt_level=0, name="ShortenNames")
class ShortenNames:
    """Calls are of a function with the beginning of the name; nothing is left of the one with all of it."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        long = {var.name_hint: func for var, func in mod.functions_items() if _is_long(var, func)}
        if not long:
            return mod
        rest = mod.clone()
        for name in long:
            del rest[name]  # or the builder would find that the function is there already
        builder = relax.BlockBuilder(rest)
        short = {name: builder.add_func(long[name], name[:LONGEST].rstrip("_")) for name in sorted(long)}

        @relax.expr_functor.mutator
        class Renamed(relax.PyExprMutator):
            def visit_call_(self, call: relax.Call) -> relax.Expr:
                args = [
                    short.get(each.name_hint, each) if _is_name(each) else self.visit_expr(each) for each in call.args
                ]
                return relax.Call(call.op, args, call.attrs, call.ty_args, call.span)

        renamed = builder.get()
        for var, func in list(renamed.functions_items()):
            if isinstance(func, relax.Function):
                renamed[var] = Renamed().visit_expr(func)
        return renamed


def _is_long(var: tvm.ir.GlobalVar, func: tvm.ir.BaseFunc) -> bool:
    return isinstance(func, tirx.PrimFunc) and len(var.name_hint) > LONGEST


def _is_name(expr: relax.Expr) -> bool:
    return isinstance(expr, tvm.ir.GlobalVar)
