"""Permutes move down the graph, past all that can be computed in any order of axes, until one undoes the other.

Between kernels that take images channels last, what models compute by rules (sums, concatenations, slices, resizing) is
then channels last, too, and nothing is copied back and forth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tvm
import tvm_ffi
from tvm import relax

from saevit_tvm.compiler.passes.rewriting import ELEMENTWISE, array, constant, shape_of

Axes = list[int]


class Permuted(NamedTuple):
    """What a permute gives, as what it was given."""

    data: relax.Expr
    axes: Axes

    @property
    def inverse(self) -> Axes:
        return [self.axes.index(axis) for axis in range(len(self.axes))]


@tvm.ir.transform.module_pass(opt_level=0, name="SinkPermutes")
class SinkPermutes:
    """Move every permute towards the outputs as far as it goes."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        rewriter = _Rewriter(mod)
        for name, func in list(mod.functions_items()):
            if isinstance(func, relax.Function):
                rewriter.builder_.update_func(name, rewriter.visit_expr(func))
        return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self._splits: dict[relax.Expr, relax.Expr] = {}

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        rule = _RULES.get(getattr(call.op, "name", ""))
        moved = rule(self, call) if rule is not None and isinstance(call.ty, relax.TensorType) else None
        return call if moved is None else moved

    def visit_tuple_getitem_(self, item: relax.TupleGetItem) -> relax.Expr:
        """A part of a split: the split itself becomes one of what was permuted."""
        item = super().visit_tuple_getitem_(item)
        split = self.lookup_binding(item.tuple_value) if isinstance(item.tuple_value, relax.Var) else None
        if not isinstance(split, relax.Call) or split.op != tvm.ir.Op.get("relax.split"):
            return item
        found = self.permuted(split.args[0])
        if found is None:
            return item
        if item.tuple_value not in self._splits:
            axis = found.axes[int(split.attrs.axis) % len(found.axes)]
            cuts = split.attrs.indices_or_sections
            cuts = [int(cut) for cut in cuts] if isinstance(cuts, tvm_ffi.Array) else int(cuts)
            self._splits[item.tuple_value] = self.builder_.emit(relax.op.split(found.data, cuts, axis))
        part = self.builder_.emit(relax.TupleGetItem(self._splits[item.tuple_value], item.index))
        return relax.op.permute_dims(part, found.axes)

    def permuted(self, expr: relax.Expr) -> Permuted | None:
        value = self.lookup_binding(expr) if isinstance(expr, relax.Var) else None
        if isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.permute_dims"):
            return Permuted(value.args[0], _axes(value))
        return None

    def permute(self, expr: relax.Expr, axes: Axes) -> relax.Expr:
        """A permute of what may be one already."""
        call = self.builder_.normalize(relax.op.permute_dims(expr, axes))
        return self.builder_.emit(_permute(self, call))

    def then(self, value: relax.Expr, axes: Axes) -> relax.Expr:
        """The value, computed before its axes are permuted."""
        value = self.builder_.emit(value)
        return relax.op.permute_dims(value, axes) if axes != sorted(axes) else value


def _axes(call: relax.Call) -> Axes:
    rank = len(shape_of(call))
    return [*reversed(range(rank))] if call.attrs.axes is None else [int(axis) % rank for axis in call.attrs.axes]


def _with_attrs(call: relax.Call, operands: Sequence[relax.Expr], **changes: Any) -> relax.Call:
    """The same operator of other operands."""
    fields = {each.name: getattr(call.attrs, each.name) for each in type(call.attrs).__tvm_ffi_type_info__.fields}
    return relax.Call(call.op, operands, type(call.attrs)(**fields | changes), call.ty_args)


# Rules: what an operator gives, computed before the permute and permuted afterwards; None where it stays ---------


def _permute(rewriter: _Rewriter, call: relax.Call) -> relax.Expr:
    found = rewriter.permuted(call.args[0]) or Permuted(call.args[0], [*range(len(shape_of(call)))])
    axes = [found.axes[axis] for axis in _axes(call)]
    shape = shape_of(found.data)
    moving = [axis for axis in axes if shape[axis] != 1]
    if axes == sorted(axes):
        return found.data
    if moving == sorted(moving):  # what has one number moves nothing
        return relax.op.reshape(found.data, shape_of(call))
    return relax.op.permute_dims(found.data, axes)


def _elements(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    """One or several tensors, element by element, smaller ones repeated."""
    whole = shape_of(call)
    each = [rewriter.permuted(operand) for operand in call.args if isinstance(operand.ty, relax.TensorType)]
    found = next((one for one in each if one is not None and len(one.axes) == len(whole)), None)
    if found is None or sorted(shape_of(found.data)) != sorted(whole):
        return None
    return rewriter.then(_again(call, [_before(rewriter, operand, found) for operand in call.args]), found.axes)


def _again(call: relax.Call, operands: Sequence[relax.Expr]) -> relax.Call:
    return relax.Call(call.op, operands, call.attrs, call.ty_args)


def _before(rewriter: _Rewriter, operand: relax.Expr, found: Permuted) -> relax.Expr:
    """An operand as it goes with what was permuted."""
    if not isinstance(operand.ty, relax.TensorType):
        return operand
    own = rewriter.permuted(operand)
    if own is not None and own.axes == found.axes:
        return own.data
    shape = shape_of(operand)
    padded = (*[1] * (len(found.axes) - len(shape)), *shape)
    if isinstance(operand, tvm.ir.GenericConst) and str(operand.ty.dtype) in ("float32", "float16"):
        return constant(array(operand).reshape(padded).transpose(found.inverse)) if shape else operand
    if not shape:
        return operand
    if padded != shape:
        operand = rewriter.builder_.emit(relax.op.reshape(operand, padded))
    return rewriter.permute(operand, found.inverse)


def _concat(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    parts = rewriter.lookup_binding(call.args[0]) if isinstance(call.args[0], relax.Var) else call.args[0]
    if not isinstance(parts, relax.Tuple):
        return None
    found = next(filter(None, map(rewriter.permuted, parts.fields)), None)
    if found is None:
        return None
    axis = found.axes[int(call.attrs.axis) % len(found.axes)]
    return rewriter.then(relax.op.concat([_before(rewriter, part, found) for part in parts.fields], axis), found.axes)


def _slice(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    found = rewriter.permuted(call.args[0])
    if found is None or len(call.args) != 5:
        return None
    axes, *bounds = ([int(number) for number in part] for part in call.args[1:])
    return rewriter.then(relax.op.strided_slice(found.data, [found.axes[axis] for axis in axes], *bounds), found.axes)


def _taken(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    """Some places along an axis."""
    found, (_, places) = rewriter.permuted(call.args[0]), call.args
    if found is None or call.attrs.axis is None or len(places.ty.shape) != 1:
        return None
    axis = found.axes[int(call.attrs.axis) % len(found.axes)]
    return rewriter.then(_with_attrs(call, [found.data, places], axis=axis), found.axes)


def _reduction(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    found = rewriter.permuted(call.args[0])
    if found is None or call.attrs.axis is None:
        return None
    rank = len(found.axes)
    over = {int(axis) % rank for axis in call.attrs.axis}
    value = _with_attrs(call, [found.data], axis=sorted(found.axes[axis] for axis in over))
    if call.attrs.keepdims:
        return rewriter.then(value, found.axes)
    kept = [found.axes[axis] for axis in range(rank) if axis not in over]
    return rewriter.then(value, [sorted(kept).index(axis) for axis in kept])


def _along_one_axis(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    """Softmax."""
    found = rewriter.permuted(call.args[0])
    if found is None:
        return None
    axis = found.axes[int(call.attrs.axis) % len(found.axes)]
    return rewriter.then(_with_attrs(call, [found.data], axis=axis), found.axes)


def _layer_norm(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    found = rewriter.permuted(call.args[0])
    if found is None or len(call.attrs.axes) != 1:
        return None
    axis = found.axes[int(call.attrs.axes[0]) % len(found.axes)]
    return rewriter.then(_with_attrs(call, [found.data, *call.args[1:]], axes=[axis]), found.axes)


def _group_norm(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    found = rewriter.permuted(call.args[0])
    if found is None:
        return None
    rank = len(found.axes)
    changes = {
        "channel_axis": found.axes[int(call.attrs.channel_axis) % rank],
        "axes": sorted(found.axes[int(axis) % rank] for axis in call.attrs.axes),
    }
    return rewriter.then(_with_attrs(call, [found.data, *call.args[1:]], **changes), found.axes)


def _padded(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    found = rewriter.permuted(call.args[0])
    if found is None:
        return None
    widths = [int(width) for width in call.attrs.pad_width]
    moved = [width for axis in found.inverse for width in widths[2 * axis : 2 * axis + 2]]
    return rewriter.then(_with_attrs(call, [found.data, *call.args[1:]], pad_width=moved), found.axes)


def _image(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    """What knows where the channels of an image are: pooling, resizing."""
    found = rewriter.permuted(call.args[0])
    if found is None or found.axes != [0, 3, 1, 2] or call.attrs.layout != "NCHW":
        return None
    changes = {name: "NHWC" for name in ("layout", "out_layout") if hasattr(call.attrs, name)}
    return rewriter.then(_with_attrs(call, [found.data, *call.args[1:]], **changes), found.axes)


def _reshape(rewriter: _Rewriter, call: relax.Call) -> relax.Expr | None:
    """Axes that are joined or taken apart; those that are joined lie beside each other before the permute, too."""
    found = rewriter.permuted(call.args[0])
    groups = found and _groups(shape_of(call.args[0]), shape_of(call))
    if found is None or groups is None:
        return None
    whole, moved = shape_of(call), []
    for given, made in groups:
        before = [found.axes[axis] for axis in given]
        if before != [*range(before[0], before[0] + len(before))]:
            return None
        moved.append((before[0], made))
    order = [axis for _, made in sorted(moved) for axis in made]
    value = relax.op.reshape(found.data, [whole[axis] for axis in order])
    return rewriter.then(value, [order.index(axis) for axis in range(len(whole))])


def _groups(given: Sequence[int], made: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Which axes become which: the smallest runs of either that hold as many numbers; none is empty."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(given) and j < len(made):
        before, after = [i], [j]
        left, right = given[i], made[j]
        while left != right:
            if left < right:
                i += 1
                left *= given[i]
                before.append(i)
            else:
                j += 1
                right *= made[j]
                after.append(j)
        groups.append((before, after))
        i, j = i + 1, j + 1
    if not groups or any(extent != 1 for extent in (*given[i:], *made[j:])):
        return None
    groups[-1][0].extend(range(i, len(given)))
    groups[-1][1].extend(range(j, len(made)))
    return groups


_RULES: dict[str, Callable[[_Rewriter, relax.Call], relax.Expr | None]] = {
    "relax.permute_dims": _permute,
    "relax.concat": _concat,
    "relax.strided_slice": _slice,
    "relax.take": _taken,
    "relax.nn.softmax": _along_one_axis,
    "relax.nn.log_softmax": _along_one_axis,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.group_norm": _group_norm,
    "relax.nn.pad": _padded,
    "relax.image.resize2d": _image,
    **dict.fromkeys([f"relax.nn.{name}" for name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")], _image),
    **dict.fromkeys([f"relax.{name}" for name in ("mean", "sum", "max", "min", "prod", "variance", "std")], _reduction),
    **dict.fromkeys([f"relax.{name}" for name in ("reshape", "expand_dims", "squeeze", "flatten")], _reshape),
    **dict.fromkeys(ELEMENTWISE, _elements),
}
