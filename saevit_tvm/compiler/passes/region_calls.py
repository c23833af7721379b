"""Replace every call of a grouped function: what declares kernels for CPUs and what launches them on GPUs begin so."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax

from relay_patterns import Reading, Region, read_composite

# What to put in place of a call; the rewriter's builder emits what it needs before.
Replacement = Callable[["Rewriter", relax.Call, Region, Reading], relax.Expr]


def replace_regions(mod: tvm.IRModule, replacement: Replacement) -> tvm.IRModule:
    """Rewrite every function that is not itself a region; regions that nobody calls any more are gone."""
    rewriter = Rewriter(mod, replacement)
    for name, func in list(mod.functions_items()):
        if isinstance(func, relax.Function) and rewriter.region_of(name) is None:
            rewriter.builder_.update_func(name, rewriter.visit_expr(func))
    return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, replacement: Replacement) -> None:
        super().__init__(mod)
        self._mod, self._replacement = mod, replacement

    def region_of(self, name: tvm.ir.GlobalVar) -> tuple[Region, Reading] | None:
        func = self._mod[name]
        return read_composite(func) if isinstance(func, relax.Function) else None

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        found = self.region_of(call.op) if isinstance(call.op, tvm.ir.GlobalVar) else None
        return self._replacement(self, call, *found) if found else call
