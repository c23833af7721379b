"""Importing leaves operators that move nothing, or move twice: broadcasts, reshapes, permutes and slices.

Half precision leaves casts to float32 and back, between regions that both speak float16.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.dpl import DFPattern, is_const, is_op, wildcard

from saevit_tvm.compiler.passes.rewriting import Matched, Rule, array, constant, rewrite, shape_of


def _same_shape(op: str) -> Rule:
    data = wildcard()
    pattern = is_op(op)(data, wildcard())

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        return matched[data] if shape_of(matched[data]) == shape_of(expr) else expr

    return pattern, replace


def _reshape_of_reshape() -> Rule:
    data, shape = wildcard(), wildcard()
    pattern = is_op("relax.reshape")(is_op("relax.reshape")(data, wildcard()), shape)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        return relax.op.reshape(matched[data], shape_of(expr))

    return pattern, replace


def _empty_pad() -> Rule:
    data = wildcard()
    pattern = is_op("relax.nn.pad")(data)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        return expr if any(int(width) for width in matched[pattern].attrs.pad_width) else matched[data]

    return pattern, replace


def _axes(call: relax.Call) -> list[int]:
    rank = len(shape_of(call))
    if call.attrs.axes is None:
        return list(reversed(range(rank)))
    return [int(axis) % rank for axis in call.attrs.axes]


def _permute_of_permute() -> Rule:
    data = wildcard()
    inner = is_op("relax.permute_dims")(data)
    outer = is_op("relax.permute_dims")(inner)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        first = _axes(matched[inner])
        return relax.op.permute_dims(matched[data], [first[axis] for axis in _axes(matched[outer])])

    return outer, replace


def _identity_permute() -> Rule:
    data = wildcard()
    pattern = is_op("relax.permute_dims")(data)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        axes = _axes(matched[pattern])
        return matched[data] if axes == sorted(axes) else expr

    return pattern, replace


def _slice(data: DFPattern) -> DFPattern:
    return is_op("relax.strided_slice")(data, *(wildcard() for _ in range(4)))


def _slice_of_slice() -> Rule:
    """Importing writes a slice for each axis."""
    data = wildcard()
    inner = _slice(data)
    outer = _slice(inner)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        pairs = zip(matched[inner].args[1:], matched[outer].args[1:], strict=True)
        axes, *rest = ([int(number) for part in pair for number in part] for pair in pairs)
        apart = len({axis % len(shape_of(expr)) for axis in axes}) == len(axes)
        return relax.op.strided_slice(matched[data], axes, *rest) if apart else expr

    return outer, replace


def _matmul_of_broadcast(reshaped: bool) -> Rule:
    """Some linear layers arrive with a copy of their weights for each picture or window; matmul needs but one."""
    data, weight = wildcard(), wildcard()
    copies = is_op("relax.broadcast_to")(weight, wildcard())
    factor = is_op("relax.reshape")(copies, wildcard()) if reshaped else copies
    matmul = is_op("relax.matmul")(data, factor)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        left, right = shape_of(matched[data]), shape_of(matched[weight])
        whole = shape_of(matched[factor])[-2:] == right  # so that it is the copies that a reshape counts
        shared = whole and shape_of(expr)[:-2] == left[:-2]
        return relax.op.matmul(matched[data], matched[weight]) if shared else expr

    return matmul, replace


def _moved_constant(op: str, *others: DFPattern) -> Rule:
    """TVM would compile a kernel for each permute and reshape of a weight to fold it; numpy just does it."""
    data = is_const()
    pattern = is_op(op)(data, *others)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        value = array(matched[data])
        if value.dtype not in ("float32", "float16"):
            return expr
        moved = value.reshape(shape_of(expr)) if others else value.transpose(_axes(expr))
        return constant(moved)

    return pattern, replace


def _squeeze_from_the_end() -> Rule:
    """TVM's change of layouts takes an axis that is counted from the end for one in front of all, and crashes."""
    data = wildcard()
    pattern = is_op("relax.squeeze")(data)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        axes = matched[pattern].attrs.axis
        if axes is None or all(int(axis) >= 0 for axis in axes):
            return expr
        rank = len(shape_of(matched[data]))
        return relax.op.squeeze(matched[data], sorted(int(axis) % rank for axis in axes))

    return pattern, replace


def _widened_and_back() -> Rule:
    data = wildcard()
    pattern = is_op("relax.astype")(is_op("relax.astype")(data))

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        same = matched[data].ty.dtype == expr.ty.dtype == "float16"
        return matched[data] if same and matched[pattern].args[0].ty.dtype == "float32" else expr

    return pattern, replace


@tvm.ir.transform.module_pass(opt_level=0, name="RemoveNoOps")
class RemoveNoOps:
    """Drop what changes nothing, join what undoes or continues the other, and move weights once and for all."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite(
            mod,
            [
                _same_shape("relax.broadcast_to"),
                _reshape_of_reshape(),
                _same_shape("relax.reshape"),
                _empty_pad(),
                _permute_of_permute(),
                _identity_permute(),
                _slice_of_slice(),
                _matmul_of_broadcast(reshaped=False),
                _matmul_of_broadcast(reshaped=True),
                _moved_constant("relax.permute_dims"),
                _moved_constant("relax.reshape", wildcard()),
                _widened_and_back(),
                _squeeze_from_the_end(),
            ],
        )
