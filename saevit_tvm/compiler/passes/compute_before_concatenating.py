"""What is computed number by number of several convolutions' results side by side is computed of each of them before.

There it is a scale in a convolution's weights or an activation in its epilogue, and costs nothing; behind the
concatenation every number would be read and written once more. Convolutions of several sizes side by side (MixNet) have
their norm and their activation there.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from relay_patterns.graph import Graph
from relay_patterns.region import per_channel
from saevit_tvm.compiler.passes.rewriting import ELEMENTWISE, bind, constant, rewritten, shape_of

CONVOLUTIONS = ("relax.nn.conv2d", "relax.nn.conv2d_transpose")
Sizes = tuple[int, ...]


@tvm.ir.transform.module_pass(opt_level=0, name="ComputeBeforeConcatenating")
class ComputeBeforeConcatenating:
    """Move norms and activations before concatenations of convolutions' channels."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return rewritten(mod, _Rewriter(mod, Graph(mod["main"])))


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, graph: Graph) -> None:
        super().__init__(mod)
        self._graph = graph
        self._sizes = _sizes(graph)
        self._parts: dict[relax.Var, list[relax.Expr]] = {}  # by what they are side by side

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        parts = self._computed(binding.value) if binding.var in self._sizes else None
        if parts is None:
            return super().visit_var_binding_(binding)
        self._parts[binding.var] = parts
        return bind(self, binding.var, relax.op.concat(parts, 1))  # nobody reads most of them

    def _computed(self, value: relax.Expr) -> list[relax.Expr] | None:
        if isinstance(value, relax.TupleGetItem):
            value = self._graph.values[value.tuple_value]  # the norm; what else it gives nobody reads
        elif _is_call(value, "relax.nn.batch_norm"):
            return None
        elif _is_call(value, "relax.concat"):
            return [self.visit_expr(part) for part in value.args[0].fields]
        wholes = [arg for arg in value.args if isinstance(arg, relax.Var)]
        if not all(whole in self._parts and self._is_read_in_parts(whole) for whole in wholes):
            return None
        sizes, start, parts = self._sizes[wholes[0]], 0, []
        for at, size in enumerate(sizes):
            operands = [self._operand(arg, at, start, size, sum(sizes)) for arg in value.args]
            part = self.builder_.emit(relax.Call(value.op, operands, value.attrs, value.ty_args))
            is_norm = _is_call(value, "relax.nn.batch_norm")
            parts.append(self.builder_.emit(relax.TupleGetItem(part, 0)) if is_norm else part)
            start += size
        return parts

    def _is_read_in_parts(self, whole: relax.Var) -> bool:
        """By everybody: else it is computed twice."""
        return whole not in self._graph.outputs and all(user in self._sizes for user in self._graph.users(whole))

    def _operand(self, operand: relax.Expr, part: int, start: int, size: int, channels: int) -> relax.Expr:
        if isinstance(operand, relax.Var):
            return self._parts[operand][part]
        if not isinstance(operand, tvm.ir.GenericConst) or channels not in shape_of(operand):
            return operand
        numbers = per_channel(operand, channels, *((1, 0) if len(shape_of(operand)) == 1 else ()))
        assert numbers is not None  # as _is_by_channel has seen
        wide = [-1 if extent == channels else 1 for extent in shape_of(operand)]
        return constant(numbers[start : start + size].reshape(wide))


def _sizes(graph: Graph) -> dict[relax.Var, Sizes]:
    """How many channels each part has of what can be computed part by part."""
    found: dict[relax.Var, Sizes] = {}
    for var in graph.order:
        value = graph.values[var]
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in found and value.index == 0:
            found[var] = found[value.tuple_value]
        elif _is_call(value, "relax.concat"):
            if (sizes := _side_by_side(graph, var, value)) is not None:
                found[var] = sizes
        elif isinstance(value, relax.Call):
            wholes = [arg for arg in value.args if isinstance(arg, relax.Var)]
            of = {found.get(whole) for whole in wholes}
            if len(of) == 1 and (sizes := of.pop()) is not None and _is_by_channel(value, shape_of(wholes[0])):
                found[var] = sizes
    return found


def _side_by_side(graph: Graph, var: relax.Var, concat: relax.Call) -> Sizes | None:
    parts = concat.args[0]
    if not isinstance(parts, relax.Tuple) or len(shape_of(var)) != 4 or int(concat.attrs.axis) != 1:
        return None
    if not all(isinstance(part, relax.Var) and _is_of_convolution(graph, part) for part in parts.fields):
        return None
    return tuple(shape_of(part)[1] for part in parts.fields)


def _is_of_convolution(graph: Graph, var: relax.Var) -> bool:
    """And nothing else reads it."""
    if len(graph.users(var)) != 1 or var in graph.outputs:
        return False
    value = graph.values.get(var)
    if isinstance(value, relax.TupleGetItem):
        return _is_of_convolution(graph, value.tuple_value)
    call = graph.call(var)
    if call is None:
        return False
    if getattr(call.op, "name", "") in CONVOLUTIONS:
        return True
    operands = [arg for arg in call.args if isinstance(arg, relax.Var)]
    return len(operands) == 1 and _is_by_channel(call, shape_of(operands[0])) and _is_of_convolution(graph, operands[0])


def _is_by_channel(call: relax.Call, shape: Sequence[int]) -> bool:
    """Whether it computes of each number of such images another one, with the same constants for all of a channel."""
    constants = [arg for arg in call.args if isinstance(arg, tvm.ir.GenericConst)]
    if _is_call(call, "relax.nn.batch_norm"):
        return int(call.attrs.axis) == 1 and len(constants) == 4
    return (
        getattr(call.op, "name", "") in ELEMENTWISE
        and isinstance(call.ty, relax.TensorType)
        and shape_of(call) == tuple(shape)
        and all("float" in str(each.ty.dtype) and per_channel(each, shape[1]) is not None for each in constants)
        and all(shape_of(arg) == tuple(shape) for arg in call.args if isinstance(arg, relax.Var))
    )


def _is_call(value: relax.Expr, name: str) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == name
