"""Linear layers over tokens keep the shape of their tokens: importing makes one matrix of all tokens, and back."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.relax.dpl import is_const, is_op, wildcard

from saevit_tvm.compiler.passes.rewriting import Matched, Rule, rewrite, shape_of


def _reshaped_product() -> Rule:
    rows, weight = wildcard(), is_const()
    pattern = is_op("relax.reshape")(is_op("relax.matmul")(rows, weight), wildcard())

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        (*lead, columns), matrix = shape_of(expr), shape_of(matched[weight])
        if len(matrix) != 2 or columns != matrix[1]:
            return expr
        return relax.op.matmul(relax.op.reshape(matched[rows], (*lead, matrix[0])), matched[weight])

    return pattern, replace


def _reshaped_sum(operator: str) -> Rule:
    """Only with one number a column: anything else depends on how rows are counted."""
    rows, offset = wildcard(), is_const()
    pattern = is_op("relax.reshape")(is_op(operator)(rows, offset), wildcard())

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        columns, given = shape_of(expr)[-1], shape_of(matched[rows])
        by_column = shape_of(matched[offset]) in ((columns,), (1, columns))
        if not by_column or len(given) != 2 or given[-1] != columns:
            return expr
        value = relax.op.reshape(matched[rows], shape_of(expr))
        return relax.Call(tvm.ir.Op.get(operator), [value, matched[offset]])

    return pattern, replace


@tvm.ir.transform.module_pass(opt_level=0, name="KeepTokens")
class KeepTokens:
    """Reshape before a product with weights, its scale and its bias, not after them."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite(mod, [_reshaped_sum("relax.add"), _reshaped_sum("relax.multiply"), _reshaped_product()])
