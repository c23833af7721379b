"""What the graph passes share: constants as numpy, and rewriting `main` until nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.dpl import CallPattern, DFPattern, rewrite_call

# A rule: the pattern to look for, and what to put in its place (the same expression to decline).
Matched = dict[DFPattern, relax.Expr]
Rule = tuple[DFPattern, Callable[[relax.Expr, Matched], relax.Expr]]

# Operators of one or several tensors, number by number.
ELEMENTWISE = tuple(
    f"relax.{name}"
    for name in (
        *("add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "where", "clip", "astype"),
        *("less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "logical_and", "logical_or"),
        *("logical_not", "negative", "abs", "exp", "log", "sqrt", "rsqrt", "square", "sigmoid", "tanh", "erf"),
        *("floor", "ceil", "round", "sign", "sin", "cos", "isnan", "isinf", "floor_divide", "mod"),
        *("nn.relu", "nn.relu6", "nn.leakyrelu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.softplus"),
    )
)


def array(constant: relax.Expr) -> np.ndarray:
    """The value of a constant."""
    assert isinstance(constant, tvm.ir.GenericConst)
    return constant.value.numpy()


def constant(value: np.ndarray) -> relax.Constant:
    """A constant of float32, or of float16 where the value is."""
    dtype = "float16" if value.dtype == np.float16 else "float32"
    return relax.const(np.ascontiguousarray(value, dtype=dtype), dtype)


def shape_of(expr: relax.Expr) -> tuple[int, ...]:
    """The static shape of an expression; the compiler is fed nothing else."""
    return tuple(int(extent) for extent in expr.ty.shape)


def rewrite(mod: tvm.IRModule, rules: Sequence[Rule]) -> tvm.IRModule:
    """Apply the rules to every graph function, again and again, until none of them changes anything."""
    mod = mod.clone()
    for name, func in list(mod.functions_items()):
        if isinstance(func, relax.Function):
            mod[name] = _to_fixed_point(func, rules)
    return relax.transform.Normalize()(mod)


def _to_fixed_point(func: relax.Function, rules: Sequence[Rule]) -> relax.Function:
    while True:
        before, names = func, _operators(func)
        for pattern, replace in rules:
            # TVM takes 15 ms to find nothing in a model of some hundred operators.
            if not isinstance(pattern, CallPattern) or pattern.op.expr.name in names:
                func = rewrite_call(pattern, replace, func)
        if tvm_ffi.structural_equal(before, func):
            return func


def _operators(func: relax.Function) -> set[str]:
    """The names of all operators that are called."""
    found: set[str] = set()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            found.add(expr.op.name)

    relax.analysis.post_order_visit(func, visit)
    return found


def rewritten(mod: tvm.IRModule, rewriter: relax.PyExprMutator) -> tvm.IRModule:
    """The module with `main` as the rewriter leaves it, without what nothing reads any more."""
    rewriter.builder_.update_func(mod.get_global_var("main"), rewriter.visit_expr(mod["main"]))
    return relax.transform.DeadCodeElimination()(rewriter.builder_.finalize())


def bind(rewriter: relax.PyExprMutator, var: relax.Var, value: relax.Expr) -> None:
    """Give a variable another value."""
    is_inner = isinstance(var, relax.DataflowVar)
    emitted = (rewriter.builder_.emit if is_inner else rewriter.builder_.emit_output)(value)
    rewriter.set_var_remap(var, emitted)
