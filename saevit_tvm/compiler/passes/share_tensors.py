"""After memory was planned, many tensors are views of one place: make each view once.

To make a tensor takes the virtual machine 2 us, and a small model has a hundred of them.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


@tvm.ir.transform.module_pass(opt_level=0, name="ShareTensors")
class ShareTensors:
    """Tensors of one storage, place, shape and type become one tensor; a reshape of one is another view of its place.

    That is safe in this form alone: who writes to a place when was decided before.
    """

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        mod = mod.clone()
        for name, func in list(mod.functions_items()):
            if isinstance(func, relax.Function):
                mod[name] = _Views(mod, _whole(func)).visit_expr(func)
        return mod


def _whole(func: relax.Function) -> set[relax.Var]:
    """Who is used otherwise than by its parts. (With TVM's own passes for that, OpenCL's answers are wrong.)"""
    values = [binding.value for block in func.body.blocks for binding in block.bindings] + [func.body.body]
    used = [value for value in values if not isinstance(value, relax.TupleGetItem)]
    return {var for value in used for var in relax.analysis.free_vars(value)}


@mutator
class _Views(PyExprMutator):
    def __init__(self, mod: tvm.IRModule, whole: set[relax.Var]) -> None:
        super().__init__(mod)
        self._whole = whole
        self._parts: dict[relax.Var, list[relax.Expr]] = {}  # of tuples
        self._made: dict[tuple[Any, ...], relax.Var] = {}
        self._calls: dict[relax.Var, relax.Call] = {}  # what made a tensor

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = self.visit_expr(binding.value)
        if isinstance(value, relax.Tuple):
            self._parts[binding.var] = list(value.fields)
            if binding.var not in self._whole:
                return
        if isinstance(binding.value, relax.TupleGetItem) and binding.value.tuple_value in self._parts:
            value = self._parts[binding.value.tuple_value][binding.value.index]
        if isinstance(value, relax.Var):
            self.set_var_remap(binding.var, value)
            return
        call = self._view(value, binding.var)
        if call is None:
            super().visit_var_binding_(binding)
            return
        storage, offset = call.args[0], int(call.args[1].value)
        info = binding.var.ty
        key = (storage, offset, tuple(int(extent) for extent in info.shape), str(info.dtype))
        if key not in self._made:
            self._made[key] = self.builder_.emit(call)
            self._calls[self._made[key]] = call
        self.set_var_remap(binding.var, self._made[key])

    def _view(self, value: relax.Expr, var: relax.Var) -> relax.Call | None:
        """The call that makes this value as a tensor of its own in a storage, if it is nothing else."""
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        if value.op.name == "relax.memory.alloc_tensor":
            return value
        made = self._calls.get(value.args[0]) if value.op.name == "relax.reshape" else None
        if made is None:
            return None
        storage, offset, _, dtype, *rest = made.args
        return relax.Call(made.op, [storage, offset, relax.ShapeExpr(var.ty.shape.values), dtype, *rest], made.attrs)
