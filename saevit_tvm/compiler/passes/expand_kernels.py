"""Declared kernels become loops for the target's vectors, and their weights are packed as these loops want them."""

from __future__ import annotations

import tvm
from tvm import relax

from saevit_tvm.compiler.passes.kernel_calls import read
from saevit_tvm.compiler.passes.rewriting import constant
from saevit_tvm.compiler.passes.schedule import IS_SCHEDULED, SCHEDULE
from schedules.cpu import registry
from schedules.machines.cpus import Isa


@tvm.ir.transform.module_pass(opt_level=0, name="ExpandKernels")
class ExpandKernels:
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
        found = read(self._mod, call)
        if found is None:
            return call
        func = self._mod[call.args[0]]
        tuned = registry.chosen_tiling(func, self._isa) is not None
        loops, packed = registry.lower(func, found.weights, self._isa, self._threads)
        generated = loops.with_attrs({IS_SCHEDULED: True, SCHEDULE: "tuned" if tuned else "scheduled"})
        kernel = self.builder_.add_func(generated.without_attr("global_symbol"), found.spec.op)
        return relax.call_tir(kernel, [*found.inputs, *map(constant, packed)], out_ty=call.ty_args[0])
