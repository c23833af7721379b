"""Half precision: what lies in memory is of the smaller type, and what asks for more bits is computed in float32.

* A declared kernel reads and gives the smaller type. What is between is its own affair.
* Operators that only move numbers, or whose sums can be kept in float32, work in the smaller type.
* All others (normalisation, softmax, means, transcendental functions) are computed in float32.

The inputs and the outputs of the model keep their types: casts to and from the smaller type are part of the graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm
from tvm import relax

from saevit_tvm.compiler.passes.kernel_calls import called, read, without_declarations
from saevit_tvm.compiler.passes.rewriting import array, constant
from schedules.spec import FLOAT, KernelSpec, Tensor

# Sums of products: operands of the smaller type, accumulated in float32.
PRODUCTS = {"relax.matmul", "relax.nn.conv2d"}
NARROW = {
    f"relax.{name}"
    for name in [
        *("add", "subtract", "multiply", "maximum", "minimum", "nn.relu", "nn.max_pool2d", "nn.pad"),
        *("reshape", "permute_dims", "broadcast_to", "expand_dims", "squeeze", "flatten", "flip", "tile", "repeat"),
        *("concat", "stack", "split", "strided_slice", "take"),
    ]
}
WIDE = FLOAT


@tvm.ir.transform.module_pass(opt_level=0, name="LowerPrecision")
class LowerPrecision:
    """Turn the graph and its constants into a smaller type, with casts where float32 begins and ends."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        rewriter = _Rewriter(mod, self.dtype)
        rewriter.builder_.update_func(mod.get_global_var("main"), rewriter.visit_expr(mod["main"]))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, dtype: str) -> None:
        super().__init__(without_declarations(mod))
        self._mod, self._dtype = mod, dtype
        self._casts: dict[tuple[relax.Var, str], relax.Expr] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """A variable of the graph takes whatever type its value has now; an output has the type it always had."""
        if isinstance(binding.var, relax.DataflowVar):
            return super().visit_var_binding_(binding)
        value = self.builder_.emit(self.visit_expr(binding.value))
        result = self.builder_.emit_output(self._typed(value, binding.var.ty))
        return self.set_var_remap(binding.var, result)

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if found := read(self._mod, call):
            inputs = [self._as(self.visit_expr(data), self._dtype) for data in found.inputs]
            return called(self.builder_, _storing(found.spec, self._dtype), inputs, found.weights)
        narrow = call.op.name in NARROW | PRODUCTS
        return self._computed(call, self._dtype if narrow else WIDE)

    def _computed(self, call: relax.Call, dtype: str) -> relax.Expr:
        """The call with operands of the type."""
        operands = [self._as(self.visit_expr(operand), dtype) for operand in call.args]
        attrs = call.attrs
        if dtype != WIDE and call.op.name in PRODUCTS:
            fields = {each.name: getattr(attrs, each.name) for each in type(attrs).__tvm_ffi_type_info__.fields}
            attrs = type(attrs)(**fields | {"out_dtype": WIDE})
        return relax.Call(call.op, operands, attrs, call.ty_args)

    def _typed(self, value: relax.Expr, ty: Any) -> relax.Expr:
        """An output with the type that the model gives it."""
        if not isinstance(ty, relax.TupleType):
            return self._as(value, str(ty.dtype))
        items = value.fields if isinstance(value, relax.Tuple) else _items(value)
        return relax.Tuple([self._typed(item, each) for item, each in zip(items, ty.fields, strict=True)])

    def _as(self, value: relax.Expr, dtype: str) -> relax.Expr:
        """The value in the type, if it is of floating point; all of them, if it is a tuple."""
        if isinstance(value.ty, relax.TupleType):
            items = value.fields if isinstance(value, relax.Tuple) else _items(value)
            return relax.Tuple([self._as(item, dtype) for item in items])
        if not isinstance(value.ty, relax.TensorType) or str(value.ty.dtype) not in (WIDE, self._dtype):
            return value
        if str(value.ty.dtype) == dtype:
            return value
        if isinstance(value, tvm.ir.GenericConst):
            return constant(array(value).astype(dtype))
        if (value, dtype) not in self._casts:
            self._casts[value, dtype] = self.builder_.emit(relax.op.astype(value, dtype))
        return self._casts[value, dtype]


def _storing(spec: KernelSpec, dtype: str) -> KernelSpec:
    """The same kernel between values of another type."""

    def stored(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(replace(each, dtype=dtype) if each.dtype == FLOAT else each for each in tensors)

    return replace(spec, inputs=stored(spec.inputs), outputs=stored(spec.outputs))


def _items(value: relax.Expr) -> list[relax.Expr]:
    return [relax.TupleGetItem(value, index) for index in range(len(value.ty.fields))]
