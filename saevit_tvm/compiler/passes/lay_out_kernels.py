"""Declared kernels get and give images channels last, as CPUs like them; the permutes between them cancel out."""

from __future__ import annotations

from dataclasses import replace

import tvm
from tvm import relax

from saevit_tvm.compiler.passes.kernel_calls import KernelCall, Rewriter, called, replace_kernels
from schedules.spec import FLOAT, Tensor

PICTURE_CHANNELS = 4
TO_CHANNELS_LAST, FROM_CHANNELS_LAST = [0, 2, 3, 1], [0, 3, 1, 2]


@tvm.ir.transform.module_pass(opt_level=0, name="LayOutKernels")
class LayOutKernels:
    """Rewrite the layout of every declared kernel, with permutes around its call."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        params = list(mod["main"].params)
        return replace_kernels(mod, lambda rewriter, call: _laid_out(rewriter, call, params))


def _laid_out(rewriter: Rewriter, call: KernelCall, params: list[relax.Var]) -> relax.Expr:
    spec, inputs, builder = call.spec, list(call.inputs), rewriter.builder_
    tensors = list(spec.inputs)
    for i, (tensor, data) in enumerate(zip(spec.inputs, call.inputs, strict=True)):
        picture = _picture(rewriter, data, params) if (spec.op, i) == ("conv", 0) else None
        if picture is not None:
            tensors[i], inputs[i] = replace(tensor, dtype=FLOAT), picture
        elif _is_image(tensor):
            tensors[i] = tensor.laid_out("NHWC")
            inputs[i] = builder.emit(relax.op.permute_dims(data, TO_CHANNELS_LAST))
    if not _is_image(spec.out):
        return called(builder, replace(spec, inputs=tuple(tensors)), inputs, call.weights)
    laid_out = replace(spec, inputs=tuple(tensors), outputs=(spec.out.laid_out("NHWC"),))
    out = builder.emit(called(builder, laid_out, inputs, call.weights))
    return relax.op.permute_dims(out, FROM_CHANNELS_LAST)


def _picture(rewriter: Rewriter, data: relax.Expr, params: list[relax.Var]) -> relax.Expr | None:
    """The model's input, as it is: the first convolution copies its few channels in any case."""
    value = rewriter.lookup_binding(data) if isinstance(data, relax.Var) else None
    if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.astype"):
        (data,) = value.args
    given = any(data.same_as(param) for param in params) and data.ty.dtype == FLOAT
    return data if given and int(data.ty.shape[1]) <= PICTURE_CHANNELS else None


def _is_image(tensor: Tensor) -> bool:
    return tensor.layout == "NCHW"
