"""A kernel's text as a function of TIR.

TVM's parser visits each number of a text in Python, 60 ms a kernel, which was most of a build for a GPU. Kernels need
little of its language, and Python itself runs that, once loops, conditions and stores call TVM's builder.
"""

from __future__ import annotations

import ast
from typing import Any

from tvm import tirx
from tvm.ir import Var, is_prim_expr
from tvm.script import tirx as language
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as builder

_COMPARISONS = {"Eq": tirx.EQ, "NotEq": tirx.NE, "Lt": tirx.LT, "LtE": tirx.LE, "Gt": tirx.GT, "GtE": tirx.GE}


def read(text: str) -> tirx.PrimFunc:
    """One private function of flat buffers, loops, conditions and stores."""
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    parameters = [_set(arg.arg, _call("T.arg", ast.Constant(arg.arg), arg.annotation)) for arg in function.args.args]
    body = [_Calls().visit(statement) for statement in function.body]
    code = ast.fix_missing_locations(ast.Module([*parameters, *body], []))
    with IRBuilder() as made, builder.prim_func(is_private=True, s_tir=True):
        builder.func_name(function.name)
        exec(compile(code, f"<{function.name}>", "exec"), {"T": _Language(), **_HELPERS})  # text of our own
    return made.get()


class _Language:
    """TVM's language, and what its builder has besides."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(language, name, None)
        return getattr(builder, name) if found is None else found


class _Calls(ast.NodeTransformer):
    """Every statement as what it asks the builder for."""

    def visit_For(self, node: ast.For) -> ast.AST:
        assert isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Call)
        loop = self.visit(node.iter)
        if ast.unparse(loop.func) == "range":
            loop = _call("T.serial", *(loop.args if loop.args[1:] else [ast.Constant(0), *loop.args]))
        name = node.target.id
        named = ast.Expr(_call("_named", ast.Constant(name), ast.Name(name, ast.Load())))
        return _within(loop, [named, *self._all(node.body)], name)

    def visit_If(self, node: ast.If) -> ast.AST:
        parts: list[ast.stmt] = [_within(_call("T.Then"), self._all(node.body))]
        if node.orelse:
            parts.append(_within(_call("T.Else"), self._all(node.orelse)))
        return _within(_call("T.If", self.visit(node.test)), parts)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        (target,), value = node.targets, self.visit(node.value)
        if isinstance(target, ast.Name):
            return _set(target.id, _call("_named", ast.Constant(target.id), value))
        assert isinstance(target, ast.Subscript)
        place = self.visit(target.slice)
        places = place if isinstance(place, ast.Tuple) else ast.List([place], ast.Load())
        return ast.Expr(_call("T.buffer_store", self.visit(target.value), value, places))

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Expr(_call("_stated", self.visit(node.value)))

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        (operator,), (other,) = node.ops, node.comparators
        return _call("_compared", ast.Constant(type(operator).__name__), self.visit(node.left), self.visit(other))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        joined, *others = map(self.visit, node.values)
        for other in others:
            joined = _call("_And" if isinstance(node.op, ast.And) else "_Or", joined, other)
        return joined

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        operand = self.visit(node.operand)
        return _call("_Not", operand) if isinstance(node.op, ast.Not) else ast.UnaryOp(node.op, operand)

    def _all(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        return [self.visit(statement) for statement in statements]


def _call(name: str, *arguments: Any) -> ast.Call:
    return ast.Call(ast.parse(name, mode="eval").body, list(arguments), [])


def _set(name: str, value: ast.expr) -> ast.Assign:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _within(frame: ast.expr, body: list[ast.stmt], name: str | None = None) -> ast.With:
    return ast.With([ast.withitem(frame, ast.Name(name, ast.Store()) if name else None)], body)


def _named(name: str, made: Any) -> Any:
    """A loop's variable or a buffer; a number has no name here."""
    assert isinstance(made, Var)
    IRBuilder.name(name, made)
    return made


def _stated(value: Any) -> None:
    """A call that is a statement, if the builder has not written it down already."""
    if is_prim_expr(value):
        builder.evaluate(value)


def _compared(operator: str, a: Any, b: Any) -> Any:
    """As an expression of TIR also where both sides are known, and with numbers in the other side's type."""
    if not is_prim_expr(a):
        a = tirx.const(a, str(b.ty.dtype) if is_prim_expr(b) else "int32")
    if not is_prim_expr(b):
        b = tirx.const(b, str(a.ty.dtype))
    return _COMPARISONS[operator](a, b)


_HELPERS = {"_named": _named, "_stated": _stated, "_compared": _compared}
_HELPERS |= {"_And": tirx.And, "_Or": tirx.Or, "_Not": tirx.Not}
