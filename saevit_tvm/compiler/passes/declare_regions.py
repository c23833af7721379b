"""Regions become kernels: every grouped function turns into one call of a declared kernel, channels last.

Blocks of one shape share one declaration, because the weights are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from relay_patterns import Reading, Region
from saevit_tvm.compiler.passes.region_calls import Rewriter, replace_regions
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
        return replace_regions(mod, _Declaring(list(mod["main"].params), self.dtype))


@dataclass(frozen=True)
class _Declaring:
    params: list[relax.Var]  # the model's input
    dtype: str

    def __call__(self, rewriter: Rewriter, call: relax.Call, region: Region, reading: Reading) -> relax.Expr:
        emit = rewriter.builder_.emit
        n, *rest = shape_of(call)
        image = len(rest) == 3
        result = (n, rest[1], rest[2], rest[0]) if image else (n, *rest)
        shape, data = reading.shape, call.args[0]
        if self._reads_pictures(region, data):
            shape = {**shape, "channels_first": True}
        else:
            data = emit(relax.op.permute_dims(self._stored(rewriter, data), TO_CHANNELS_LAST))
        shape = shape if self.dtype == "float32" else {**shape, DTYPE: self.dtype}
        declaration = declare(region.name, shape, shape_of(data), reading.weights, result)
        kernel = rewriter.builder_.add_func(declaration, region.name)
        arguments = [data, *(constant(weight) for weight in reading.weights.values())]
        out = relax.call_tir(kernel, arguments, out_ty=relax.TensorType(result, self.dtype))
        out = relax.op.permute_dims(emit(out), FROM_CHANNELS_LAST) if image else out
        return out if self.dtype == "float32" else relax.op.astype(emit(out), "float32")

    def _stored(self, rewriter: Rewriter, data: relax.Expr) -> relax.Expr:
        """What the region reads, in the type in which it lies in memory: the kernel widens it itself."""
        if data.ty.dtype == self.dtype:
            return data
        cast = rewriter.lookup_binding(data) if isinstance(data, relax.Var) else None
        if isinstance(cast, relax.Call) and cast.op == tvm.ir.Op.get("relax.astype"):
            (narrow,) = cast.args
            if narrow.ty.dtype == self.dtype:
                return narrow
        return rewriter.builder_.emit(relax.op.astype(data, self.dtype))

    def _reads_pictures(self, region: Region, data: relax.Expr) -> bool:
        """The first convolution takes the model's input as it is: it copies its few channels in any case."""
        given = any(data.same_as(param) for param in self.params)
        return region.name == "conv" and given and shape_of(data)[1] <= PICTURE_CHANNELS
