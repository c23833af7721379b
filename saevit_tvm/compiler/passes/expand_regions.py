"""Declared kernels become loops for the target's vectors, and their weights are packed as these loops want them."""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from saevit_tvm.compiler.passes.rewriting import array, constant
from saevit_tvm.compiler.passes.schedule import IS_SCHEDULED, SCHEDULE
from schedules.cpu.isa import Isa
from schedules.regions import chosen_tiling, declared, lower


@tvm.ir.transform.module_pass(opt_level=0, name="ExpandRegions")
class ExpandRegions:
    """Generate the loops of every declared kernel, with the tiling that a record chose or the default."""

    def __init__(self, isa: Isa, threads: int) -> None:
        self.isa, self.threads = isa, threads

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.isa, self.threads)
        for name, func in list(mod.functions_items()):
            if isinstance(func, relax.Function):
                rewriter.builder_.update_func(name, rewriter.visit_expr(func))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, isa: Isa, threads: int) -> None:
        super().__init__(mod)
        self._mod, self._isa, self._threads = mod, isa, threads

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if call.op != tvm.ir.Op.get("relax.call_tir"):
            return call
        func = self._mod[call.args[0]]
        return self._expanded(call, func) if declared(func) else call

    def _expanded(self, call: relax.Call, func: tirx.PrimFunc) -> relax.Expr:
        found = declared(func)
        assert found is not None
        data, *weights = call.args[1]
        tiling = chosen_tiling(func)
        names = found.weights
        values = {name: array(weight) for name, weight in zip(names, weights, strict=True)}
        lowered = lower(found.region, found.shape, values, self._isa, tiling, self._threads)
        assert lowered is not None, f"{found.region} was accepted before and has no kernel now"
        generated = lowered.func.with_attrs({IS_SCHEDULED: True, SCHEDULE: "tuned" if tiling else "scheduled"})
        kernel = self.builder_.add_func(generated.without_attr("global_symbol"), found.region)
        constants = [constant(value) for value in lowered.constants]
        return relax.call_tir(kernel, [data, *constants], out_ty=call.ty_args[0])
