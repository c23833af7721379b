"""Regions become kernels: every grouped function turns into one call of a declared kernel, channels last.

Blocks of one shape share one declaration, because the weights are arguments.
"""

from __future__ import annotations

import tvm
from tvm import relax

from relay_patterns import Reading, Region, read_composite
from saevit_tvm.compiler.passes.rewriting import constant, shape_of
from schedules.regions import DTYPE, declare

PICTURE_CHANNELS = 4
TO_CHANNELS_LAST, FROM_CHANNELS_LAST = [0, 2, 3, 1], [0, 3, 1, 2]


@tvm.ir.transform.module_pass(opt_level=0, name="DeclareRegions")
class DeclareRegions:
    """Replace calls of grouped functions by calls of declared kernels, which read and give the model's type."""

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.dtype)
        for name, func in list(mod.functions_items()):
            if isinstance(func, relax.Function) and rewriter.region_of(name) is None:
                rewriter.builder_.update_func(name, rewriter.visit_expr(func))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, dtype: str) -> None:
        super().__init__(mod)
        self._mod, self._dtype = mod, dtype

    def region_of(self, name: tvm.ir.GlobalVar) -> tuple[Region, Reading] | None:
        func = self._mod[name]
        return read_composite(func) if isinstance(func, relax.Function) else None

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        found = self.region_of(call.op) if isinstance(call.op, tvm.ir.GlobalVar) else None
        return self._declared(call, *found) if found else call

    def _declared(self, call: relax.Call, region: Region, reading: Reading) -> relax.Expr:
        n, *rest = shape_of(call)
        image = len(rest) == 3
        result = (n, rest[1], rest[2], rest[0]) if image else (n, *rest)
        shape, data = reading.shape, call.args[0]
        if self._reads_pictures(region, data):
            shape = {**shape, "channels_first": True}
        else:
            data = self.builder_.emit(relax.op.permute_dims(self._stored(data), TO_CHANNELS_LAST))
        shape = shape if self._dtype == "float32" else {**shape, DTYPE: self._dtype}
        declaration = declare(region.name, shape, shape_of(data), reading.weights, result)
        kernel = self.builder_.add_func(declaration, region.name)
        arguments = [data, *(constant(weight) for weight in reading.weights.values())]
        out = relax.call_tir(kernel, arguments, out_ty=relax.TensorType(result, self._dtype))
        out = relax.op.permute_dims(self.builder_.emit(out), FROM_CHANNELS_LAST) if image else out
        return out if self._dtype == "float32" else relax.op.astype(self.builder_.emit(out), "float32")

    def _stored(self, data: relax.Expr) -> relax.Expr:
        """What the region reads, in the type in which it lies in memory: the kernel widens it itself."""
        if data.ty.dtype == self._dtype:
            return data
        cast = self.lookup_binding(data) if isinstance(data, relax.Var) else None
        if isinstance(cast, relax.Call) and cast.op == tvm.ir.Op.get("relax.astype"):
            (narrow,) = cast.args
            if narrow.ty.dtype == self._dtype:
                return narrow
        return self.builder_.emit(relax.op.astype(data, self._dtype))

    def _reads_pictures(self, region: Region, data: relax.Expr) -> bool:
        """The first convolution takes the model's input as it is: it copies its few channels in any case."""
        given = any(data.same_as(param) for param in self._mod["main"].params)
        return region.name == "conv" and given and shape_of(data)[1] <= PICTURE_CHANNELS
