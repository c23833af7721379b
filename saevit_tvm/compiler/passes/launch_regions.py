"""Regions become launches: every grouped function turns into calls of a few GPU kernels, one after the other."""

from __future__ import annotations

import tvm
from tvm import relax

from relay_patterns import Reading, Region, read_composite
from saevit_tvm.compiler.passes.rewriting import constant
from saevit_tvm.compiler.passes.schedule import IS_SCHEDULED, SCHEDULE
from schedules.gpu.launch import Limits
from schedules.gpu.regions import lower


@tvm.ir.transform.module_pass(opt_level=0, name="LaunchRegions")
class LaunchRegions:
    """Replace calls of grouped functions by calls of the kernels that compute them; equal kernels are one."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.limits)
        for name, func in list(mod.functions_items()):
            if isinstance(func, relax.Function) and rewriter.region_of(name) is None:
                rewriter.builder_.update_func(name, rewriter.visit_expr(func))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, limits: Limits) -> None:
        super().__init__(mod)
        self._mod, self._limits = mod, limits

    def region_of(self, name: tvm.ir.GlobalVar) -> tuple[Region, Reading] | None:
        func = self._mod[name]
        return read_composite(func) if isinstance(func, relax.Function) else None

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        found = self.region_of(call.op) if isinstance(call.op, tvm.ir.GlobalVar) else None
        return self._launched(call, *found) if found else call

    def _launched(self, call: relax.Call, region: Region, reading: Reading) -> relax.Expr:
        lowered = lower(region.name, reading.shape, reading.weights, self._limits)
        assert lowered is not None, f"{region.name} was accepted before and has no kernels now"
        values: dict[str, relax.Expr] = {name: constant(value) for name, value in lowered.constants.items()}
        values["x"] = call.args[0]
        for launch in lowered.launches:
            func = launch.func.with_attrs({IS_SCHEDULED: True, SCHEDULE: "scheduled"})
            kernel = self.builder_.add_func(func, launch.name)
            result = relax.TensorType(launch.shape, "float32")
            called = relax.call_tir(kernel, [values[name] for name in launch.reads], out_ty=result)
            values[launch.writes] = self.builder_.emit(called)
        return values["out"]
