"""What was found in the graph becomes calls of declared kernels, in logical form: float32, images channels first."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax

from relay_patterns import Accepts, Reading
from saevit_tvm.compiler.passes.kernel_calls import called

Find = Callable[[relax.Function, Accepts], dict[relax.Var, Reading]]


@tvm.ir.transform.module_pass(opt_level=0, name="DeclareKernels")
class DeclareKernels:
    """Replace every match by a call; what only led to it is gone."""

    def __init__(self, find: Find, accepts: Accepts) -> None:
        self.find, self.accepts = find, accepts

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        found = self.find(mod["main"], self.accepts)
        rewriter = _Rewriter(mod, found)
        rewriter.builder_.update_func(mod.get_global_var("main"), rewriter.visit_expr(mod["main"]))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, found: dict[relax.Var, Reading]) -> None:
        super().__init__(mod)
        values = relax.analysis.get_var2val(mod["main"])
        self._found = {values[var]: reading for var, reading in found.items()}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        reading = self._found.get(call)
        if reading is None:
            return super().visit_call_(call)
        inputs = [self.builder_.normalize(self.visit_expr(each)) for each in reading.inputs]
        inputs = [self.builder_.emit(each) if isinstance(each, relax.Call) else each for each in inputs]
        out = called(self.builder_, reading.spec, inputs, reading.weights)
        return out if reading.result is None else reading.result(self.builder_.emit(out))
