"""Calls of declared kernels: how one is written, read and replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax, tirx

from saevit_tvm.compiler.passes.rewriting import array, constant
from schedules.kernels import declare, declared
from schedules.spec import KernelSpec


class KernelCall(NamedTuple):
    """One call of a declared kernel, with its weights in natural layout."""

    spec: KernelSpec
    inputs: list[relax.Expr]
    weights: dict[str, np.ndarray]


# What to put in place of a call; the rewriter's builder emits what it needs before.
Replacement = Callable[["Rewriter", KernelCall], relax.Expr]


def read(mod: tvm.IRModule, call: relax.Call) -> KernelCall | None:
    """The kernel that a call calls, if it is a declared one."""
    if call.op != tvm.ir.Op.get("relax.call_tir"):
        return None
    spec = declared(mod[call.args[0]])
    if spec is None:
        return None
    inputs, weights = list(call.args[1])[: len(spec.inputs)], list(call.args[1])[len(spec.inputs) :]
    names = (weight.name for weight in spec.weights)
    return KernelCall(spec, inputs, {name: array(weight) for name, weight in zip(names, weights, strict=True)})


def kernels_called(main: relax.Function) -> Counter[str]:
    """How often the graph calls each kernel, in the order of the first calls."""
    found: Counter[str] = Counter()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.call_tir"):
            found[expr.args[0].name_hint] += 1

    relax.analysis.post_order_visit(main, visit)
    return found


def called(
    builder: relax.BlockBuilder, spec: KernelSpec, inputs: Sequence[relax.Expr], weights: Mapping[str, np.ndarray]
) -> relax.Call:
    """A call of a kernel; equal specs share one declaration, because the weights are arguments."""
    kernel = builder.add_func(declare(spec), spec.op)
    out = relax.TensorType(spec.out.shape, spec.out.dtype)
    return relax.call_tir(kernel, [*inputs, *map(constant, weights.values())], out_ty=out)


def without_declarations(mod: tvm.IRModule) -> tvm.IRModule:
    """The other functions: what is declared anew takes the names of what was declared before."""
    declarations = {name for name, func in mod.functions_items() if isinstance(func, tirx.PrimFunc) and declared(func)}
    return tvm.IRModule(
        {name: func for name, func in mod.functions_items() if name not in declarations}, attrs=mod.attrs
    )


def replace_kernels(mod: tvm.IRModule, replacement: Replacement) -> tvm.IRModule:
    """Rewrite every call of a declared kernel; the declarations that were there are gone."""
    rewriter = Rewriter(mod, replacement)
    for name, func in list(mod.functions_items()):
        if isinstance(func, relax.Function):
            rewriter.builder_.update_func(name, rewriter.visit_expr(func))
    return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


@relax.expr_functor.mutator
class Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, replacement: Replacement) -> None:
        super().__init__(without_declarations(mod))
        self._mod, self._replacement = mod, replacement

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        found = read(self._mod, call)
        return self._replacement(self, found) if found else call
