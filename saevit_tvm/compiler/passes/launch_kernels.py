"""Specs become launches: a call of a declared kernel turns into calls of a few kernels of a GPU, one after the other.

With float16 or bfloat16, what lies between kernels is of that type, and everything that has no spec stays float32:
small kernels convert where the two meet. The model's input and outputs stay float32.
"""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from saevit_tvm.compiler.passes.kernel_calls import KernelCall, Rewriter, replace_kernels
from saevit_tvm.compiler.passes.rewriting import shape_of
from saevit_tvm.compiler.passes.schedule import IS_SCHEDULED, SCHEDULE
from schedules.gpu.launch import Launch, Launches, Limits
from schedules.gpu.plan import plan
from schedules.gpu.primitives.cast import Cast
from schedules.gpu.registry import chosen_tiling, declare, expand, kernel_of

WIDE = "float32"
Values = dict[str, relax.Expr]


@tvm.ir.transform.module_pass(opt_level=0, name="LaunchKernels")
class LaunchKernels:
    """Replace calls of specs by calls of the kernels that compute them; equal kernels are one."""

    def __init__(self, limits: Limits, dtype: str = WIDE) -> None:
        self.limits, self.dtype = limits, dtype

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return replace_kernels(mod, _Launching(self.limits, self.dtype))


class _Launching:
    def __init__(self, limits: Limits, dtype: str) -> None:
        self._limits, self._dtype = limits, dtype
        self._stored: dict[relax.Var, relax.Expr] = {}  # values of specs, as their last kernel stored them

    def __call__(self, rewriter: Rewriter, call: KernelCall) -> relax.Expr:
        """The spec's value in float32; where another spec reads it, the conversion is dead code."""
        inputs = [self._as_stored(rewriter, data) for data in call.inputs]
        lowered = plan(call.spec, call.weights, self._limits, self._dtype, str(inputs[0].ty.dtype))
        assert lowered is not None, f"{call.spec.op} was accepted before and has no kernels now"
        values: Values = {name: relax.const(value, str(value.dtype)) for name, value in lowered.constants.items()}
        for tensor, data in zip(call.spec.inputs, inputs, strict=True):
            wanted = _read_as(lowered, tensor.name)
            values[tensor.name] = data if data.ty.dtype == wanted else _cast(rewriter, data, wanted)
        for launch in lowered.launches:
            values[launch.writes] = _called(rewriter, launch, values)
        out = values["out"]
        if out.ty.dtype == WIDE:
            return out
        widened = _cast(rewriter, out, WIDE)
        self._stored[widened] = out
        return widened

    def _as_stored(self, rewriter: Rewriter, data: relax.Expr) -> relax.Expr:
        """What a spec's last kernel stored, if that is what the variable stands for."""
        value = data
        while isinstance(value, relax.Var):
            if value in self._stored:
                return self._stored[value]
            value = rewriter.lookup_binding(value)
        return data


def _read_as(lowered: Launches, name: str) -> str:
    """The type in which an input is read."""
    pairs = ((each, buffer) for launch in lowered.launches for each, buffer in launch.buffers)
    return next(buffer.dtype for each, buffer in pairs if each == name)


def _cast(rewriter: Rewriter, data: relax.Expr, dtype: str) -> relax.Expr:
    kernel = Cast(shape_of(data), str(data.ty.dtype), dtype)
    return _called(rewriter, Launch(kernel, ("x",), "out"), {"x": data})


def _called(rewriter: Rewriter, launch: Launch, values: Values) -> relax.Expr:
    kernel, out = rewriter.builder_.add_func(declare(launch.kernel), launch.name), launch.kernel.out
    result = relax.TensorType(out.extents, out.dtype)
    called = relax.call_tir(kernel, [values[name] for name in launch.reads], out_ty=result)
    return rewriter.builder_.emit(called)


@tvm.ir.transform.module_pass(opt_level=0, name="ExpandLaunches")
class ExpandLaunches:
    """Generate the loops of every declared kernel, with the tiling that a record chose or the default."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        mod = mod.clone()
        for name, func in list(mod.functions_items()):
            if isinstance(func, tirx.PrimFunc) and kernel_of(func) is not None:
                origin = "tuned" if chosen_tiling(func) else "scheduled"
                mod[name] = expand(func, self.limits).with_attrs({IS_SCHEDULED: True, SCHEDULE: origin})
        return mod
