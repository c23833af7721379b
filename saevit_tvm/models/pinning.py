"""Fixed shapes for a program that was exported with dynamic ones, as data: before PyTorch sees it.

In the archive every extent that is open is a formula in symbols, which PyTorch would evaluate as Python. Here formulas
are parsed, a symbol gets the number that the chosen inputs give it, and each formula becomes its number. What only
computes shapes is then no longer needed.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from saevit_tvm.runtime.tensors import layout

Extents = tuple["int | None", ...]  # None where it is open
Shape = tuple[int, ...]
# From the inputs as exported and their typical shapes to those that are wanted.
Choose = Callable[[Sequence[Extents], Sequence[Shape]], Sequence[Shape]]

IMAGE = {"N": "batch", "C": "channels", "H": "height", "W": "width"}
LONGEST, LARGEST_POWER = 20_000, 8
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Integer": lambda number: number,
    "Rational": Fraction,
    "Add": lambda *terms: sum(terms),
    "Mul": lambda *factors: math.prod(factors),
    "FloorDiv": lambda a, b: a // b,
    "CleanDiv": lambda a, b: a // b,
    "CeilDiv": lambda a, b: -(-a // b),
    "IntTrueDiv": lambda a, b: Fraction(a) / b,
    "FloatTrueDiv": lambda a, b: Fraction(a) / b,
    "Mod": lambda a, b: a % b,
    "PythonMod": lambda a, b: a % b,
    "Max": max,
    "Min": min,
    "Pow": lambda base, power: base**power,
    "PowByNatural": lambda base, power: base**power,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "TruncToInt": math.trunc,
    "ToFloat": Fraction,
    "Identity": lambda number: number,
}
# How an argument refers to a number that is computed, and how it states one.
STATED = {"as_sym_int": ("as_int", int), "as_sym_float": ("as_float", float)}
STATED_LISTS = {"as_sym_ints": ("as_ints", int), "as_sym_floats": ("as_floats", float)}
SYMBOLIC = ("as_sym_int", "as_sym_bool", "as_sym_float")


class Unpinnable(Exception):
    """Why a program cannot get fixed shapes; the end of a sentence about it."""


class OutOfRange(Exception):
    """What the chosen shape is not, in words; the rest of a sentence that begins with the file."""


class Alone(OutOfRange):
    """One picture is asked for, and two are the fewest that the program was exported for.

    PyTorch's exporter says so of every batch that it leaves open by itself, whether or not the model takes one.
    """


def pin(program: dict[str, Any], choose: Choose, alone: bool = False) -> None:
    """Give the program the chosen shapes, in place; `alone` lets one picture in where it would be `Alone`."""
    graph = program["graph_module"]["graph"]
    given = [graph["tensor_values"][name]["sizes"] for name in _inputs(program)]
    extents = [tuple(size.get("as_int") for size in sizes) for sizes in given]
    chosen = choose(extents, [tuple(map(_typical, sizes)) for sizes in given])
    symbols: dict[str, int] = {}
    ranges = program["range_constraints"]
    if alone:
        ranges = {name: {**each, "min_val": 1} if each["min_val"] == 2 else each for name, each in ranges.items()}
    for sizes, shape in zip(given, chosen, strict=True):
        image = len(shape) == len(IMAGE)
        names = [IMAGE[each] for each in layout(shape)] if image else [f"extent {axis}" for axis in range(len(shape))]
        for name, size, extent in zip(names, sizes, shape, strict=True):
            if "as_expr" in size:
                _solve(size["as_expr"]["expr_str"], extent, name, symbols, ranges)
    shapes = dict(zip(_inputs(program), chosen, strict=True))
    for guard in program["guards_code"]:
        if not _guarded(_parsed(guard), shapes):
            raise OutOfRange(f"was exported for other shapes, those with {guard[:120]}")
    numbers = {
        name: _evaluated(value, symbols)
        for kind in ("sym_int_values", "sym_float_values")
        for name, value in graph[kind].items()
    }
    graph["nodes"] = [node for node in graph["nodes"] if not _only_of_shapes(node)]
    for kind in ("sym_int_values", "sym_float_values", "sym_bool_values"):
        graph[kind] = {}
    program["graph_module"] = _stated(program["graph_module"], numbers, symbols)
    program["range_constraints"], program["guards_code"] = {}, []


def _inputs(program: dict[str, Any]) -> Iterator[str]:
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if "user_input" in spec:
            argument = spec["user_input"]["arg"]
            if "as_tensor" not in argument:
                raise Unpinnable("takes something that is no tensor")
            yield argument["as_tensor"]["name"]


def _typical(size: dict[str, Any]) -> int:
    """What the program was exported with."""
    hint = size["as_expr"].get("hint") if "as_expr" in size else None
    return int((hint or {}).get("as_int", 1)) if "as_expr" in size else int(size["as_int"])


def _solve(formula: str, extent: int, what: str, symbols: dict[str, int], ranges: Mapping[str, Any]) -> None:
    """Find the symbol of an input's extent: that itself, or a multiple of it, maybe with an offset."""
    tree = _parsed(formula)
    names = {name for node in ast.walk(tree) if (name := _symbol(node)) is not None}
    unknown = sorted(names - symbols.keys())
    if len(unknown) > 1:
        raise Unpinnable("has an extent of an input that depends on several others")
    for name in unknown:
        at = [_value(tree, symbols | {name: number}) for number in (0, 1)]
        symbols[name] = round(Fraction(extent - at[0]) / (at[1] - at[0])) if at[0] != at[1] else 0
        _check_range(name, extent, what, tree, symbols, ranges.get(name) or {})
    if _value(tree, symbols) != extent:
        raise OutOfRange(f"does not take {extent} as {what}, which goes in steps or with another extent")


def _check_range(
    name: str, extent: int, what: str, tree: ast.expr, symbols: Mapping[str, int], allowed: Mapping[str, Any]
) -> None:
    least, most = allowed.get("min_val"), allowed.get("max_val")
    if (least is None or symbols[name] >= least) and (most is None or symbols[name] <= most):
        return
    first, last = (None if bound is None else _value(tree, {**symbols, name: bound}) for bound in (least, most))
    words = f"{first or 0} or more" if last is None else f"{first or 0} to {last}"
    kind = Alone if (what, extent, first) == (IMAGE["N"], 1, 2) else OutOfRange
    raise kind(f"takes {words} as {what}, not {extent}")


# Formulas ---------------------------------------------------------------------


def _evaluated(value: dict[str, Any], symbols: Mapping[str, int]) -> Any:
    if "as_expr" not in value:
        return next(iter(value.values()))
    return _value(_parsed(value["as_expr"]["expr_str"]), symbols)


def _parsed(formula: str) -> ast.expr:
    if len(formula) > LONGEST:
        raise Unpinnable("computes a shape with a formula that is too long")
    try:
        return ast.parse(formula, mode="eval").body
    except (SyntaxError, MemoryError) as error:
        raise Unpinnable(f"computes a shape with '{formula[:40]}'") from error


def _symbol(node: ast.AST) -> str | None:
    """The name in `Symbol('s77', integer=True)`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Symbol" and node.args:
        return str(getattr(node.args[0], "value", ""))
    return None


def _value(node: ast.expr, symbols: Mapping[str, int]) -> Any:
    """The number that a formula is: nothing in it is called but what the table above has."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, symbols)
    if (name := _symbol(node)) is not None:
        if name not in symbols:
            raise Unpinnable("has shapes that depend on the values of its inputs")
        return symbols[name]
    called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
    function = FUNCTIONS.get(called)
    if not isinstance(node, ast.Call) or function is None:
        raise Unpinnable(f"computes a shape with '{ast.unparse(node)[:40]}'")
    operands = [_value(operand, symbols) for operand in node.args]
    if "Pow" in called and not 0 <= operands[-1] <= LARGEST_POWER:
        raise Unpinnable("computes a shape with a large power")
    try:
        return function(*operands)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise Unpinnable(f"computes a shape with '{ast.unparse(node)[:40]}', which has no value here") from error


OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _guarded(node: ast.AST, shapes: Mapping[str, Shape]) -> Any:
    """What a guard says of extents, as in `L['x'].size()[2] % 2 == 0`: which way the model went depends on it."""
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_guarded(operand, shapes)
        case ast.Subscript(
            value=ast.Call(
                func=ast.Attribute(
                    value=ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str() as name)), attr="size"
                )
            ),
            slice=ast.Constant(value=int() as axis),
        ) if name in shapes and axis < len(shapes[name]):
            return shapes[name][axis]
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]) if (
            type(op) in OPERATORS
        ):
            try:
                return OPERATORS[type(op)](_guarded(left, shapes), _guarded(right, shapes))
            except ArithmeticError:
                return False
    raise Unpinnable(f"checks its shapes with '{ast.unparse(node)[:40]}'")


# The graph --------------------------------------------------------------------


def _only_of_shapes(node: dict[str, Any]) -> bool:
    """Whether it computes numbers of shapes, or checks them, and no tensor."""
    results = [key for output in node["outputs"] for key in output]
    if results:
        return all(key in SYMBOLIC for key in results)
    return any(key in SYMBOLIC for given in node["inputs"] for key in given["arg"])


def _stated(value: Any, numbers: Mapping[str, Any], symbols: Mapping[str, int]) -> Any:
    """The same with numbers in place of formulas and of names."""
    if isinstance(value, list):
        return [_stated(each, numbers, symbols) for each in value]
    if not isinstance(value, dict):
        return value
    if "as_expr" in value:
        return {"as_int": _whole(_evaluated(value, symbols))}
    for key, (stated, kind) in STATED.items():
        if key in value:
            return {stated: kind(_number(value[key], numbers))}
    for key, (stated, kind) in STATED_LISTS.items():
        if key in value:
            return {stated: [kind(_number(each, numbers)) for each in value[key]]}
    return {key: _stated(each, numbers, symbols) for key, each in value.items()}


def _number(argument: Mapping[str, Any], numbers: Mapping[str, Any]) -> Any:
    return numbers[argument["as_name"]] if "as_name" in argument else next(iter(argument.values()))


def _whole(number: Any) -> int:
    if number != int(number):
        raise Unpinnable("has an extent that is no whole number")
    return int(number)
