"""What the kernels of a GPU library ask of the device, read from their loops: launches, work, memory.

No kernel leaves the compiler that the device would refuse, and models of time have something to go by.

Work is what is really done: the conditions around it, which keep work-items from beyond an edge, are evaluated for
every one of them. Registers are an upper estimate: all that is private to a work-item, alive at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import Call
from tvm.ir.expr import Expr, TensorLoad

from saevit_tvm.compiler.passes.kernel_calls import kernels_called
from saevit_tvm.support.errors import CompileError
from schedules.gpu.fallback import lowered
from schedules.gpu.launch import INDICES
from schedules.gpu.primitives.fragments import product
from schedules.machines.gpus import Limits

REGISTER = 4  # bytes
MOST_POINTS = 1 << 22  # of a condition's variables, beyond which it is taken to hold
AXES = "xyz"
ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min)
FREE = ("tirx.address_of", "tirx.if_then_else", "tirx.reinterpret")  # calls that compute nothing
FUNCTION = "tirx.cuda.func_call"

Row = dict[str, Any]


def launches(mod: tvm.IRModule) -> list[Row]:
    """One row for every kernel, in the order of their first launch; `calls` is how often one inference launches it."""
    rows: list[Row] = []
    for name, calls in kernels_called(mod["main"]).items():
        for number, row in enumerate(read(mod[name])):
            suffix = f"_{number}" if number else ""  # as TVM names them
            rows.append({"kernel": f"{name}_kernel{suffix}", "calls": calls, **row})
    return rows


def check_launches(mod: tvm.IRModule, limits: Limits, device: str) -> None:
    """Raise CompileError for a kernel beyond the limits of the device: work-groups, local memory and registers."""
    for name, func in mod.functions_items():
        for row in read(func) if isinstance(func, tirx.PrimFunc) else ():
            excess = limits.excess(*usage(row))
            if excess:
                raise CompileError(
                    f"the kernel '{name.name_hint}' cannot run on {device}: it wants {excess}; "
                    "build with --no-tuned, or for a device with more."
                )


def usage(row: Row) -> tuple[int, int, int]:
    """Work-items of a work-group, bytes of local memory, registers of a work-item."""
    return math.prod(row["group"]), row["local_bytes"], row["registers"]


def read(func: tirx.PrimFunc) -> list[Row]:
    """What each launch of a scheduled function does and needs."""
    func = lowered(func, tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm"}}))
    statements = func.body.seq if isinstance(func.body, tirx.SeqStmt) else [func.body]
    views = {each.buffer: each.data.args[0] for each in statements if isinstance(each, tirx.DeclBuffer)}
    found = [each for each in statements if isinstance(each, tirx.For | tirx.AttrStmt)]
    return [_Reading(func, views, launch).row() for launch in found]


class _Reading:
    """One launch, counted."""

    def __init__(self, func: tirx.PrimFunc, views: dict[Any, Any], launch: tirx.Stmt) -> None:
        self._sizes: dict[str, dict[str, int]] = {"blockIdx": {}, "threadIdx": {}}
        self._memory: Counter[str] = Counter()
        self._hidden = 0  # registers of functions that are called
        self._counts: Counter[str] = Counter()
        self._accessed: Counter[Any] = Counter()
        self._images: set[Any] = set()
        self._views = dict(views)
        self._main_memory = {buffer: _bytes(buffer) for buffer in func.params}
        self._extents: dict[Any, int] = {}  # of the loops around
        self._conditions: list[Any] = []  # around
        self._share = 1.0  # of all cases, in which they hold
        self._statement(launch, 1)

    def row(self) -> Row:
        return {
            "grid": [self._sizes["blockIdx"].get(axis, 1) for axis in AXES],
            "group": [self._sizes["threadIdx"].get(axis, 1) for axis in AXES],
            "float_ops": self._counts["float_ops"],
            "tensor_ops": self._counts["tensor_ops"],
            "bytes": sum(min(size, self._accessed[buffer]) for buffer, size in self._main_memory.items()),
            "bytes_loaded": self._counts["loaded"],
            "bytes_stored": self._counts["stored"],
            "local_bytes": self._memory["shared"],
            "registers": INDICES + self._hidden + -(-self._memory["local"] // REGISTER),
            "images": len(self._images),
        }

    def _statement(self, node: Any, times: int) -> None:
        if isinstance(node, tirx.SeqStmt):
            for each in node.seq:
                self._statement(each, times)
        elif isinstance(node, tirx.For):
            tag = "" if node.thread_binding is None else str(node.thread_binding.thread_tag)
            self._loop(node.loop_var, tag, int(node.extent), node.body, times)
        elif isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            self._loop(node.node.var, str(node.node.thread_tag), int(node.value), node.body, times)
        elif isinstance(node, tirx.AttrStmt):
            self._statement(node.body, times)
        elif isinstance(node, tirx.IfThenElse):
            self._expression(node.condition, times)
            self._case(node.condition, node.then_case, times)
            if node.else_case is not None:
                self._case(tirx.Not(node.condition), node.else_case, times)
        elif isinstance(node, tirx.BufferStore):
            self._access("stored", node.buffer, times * _lanes(node.value))
            self._expression(node.value, times)
        elif isinstance(node, tirx.AllocBuffer):
            self._memory[str(node.buffer.scope()).partition(".")[0]] += _bytes(node.buffer)
        elif isinstance(node, tirx.DeclBuffer):
            self._views[node.buffer] = node.data.args[0]
        elif isinstance(node, tirx.Evaluate | tirx.Bind):
            self._expression(node.value, times)

    def _loop(self, variable: Any, tag: str, extent: int, body: Any, times: int) -> None:
        """A loop, or a launch extent, which may be bound more than once and is then the same again."""
        what, _, axis = tag.partition(".")
        again = axis in self._sizes.get(what, {})
        if what in self._sizes:
            self._sizes[what][axis] = extent
        self._extents[variable] = extent
        self._statement(body, times if again else times * extent)

    def _case(self, condition: Any, body: Any, times: int) -> None:
        around = self._share
        self._conditions.append(condition)
        self._share = _share(self._conditions, self._extents)  # variables of loops within are in none of them
        self._statement(body, times)
        self._conditions.pop()
        self._share = around

    def _expression(self, node: Any, times: int) -> None:
        if isinstance(node, TensorLoad):
            self._access("loaded", node.source, times * _lanes(node))
        elif isinstance(node, Call) and _half(node):
            self._half_access(node, times)
        elif isinstance(node, Call) and _called(node).startswith("read_image"):
            buffer = node.args[1].args[0]
            self._images.add(self._views.get(buffer, buffer))
            self._access("loaded", buffer, times * _lanes(node))
        elif _name(node) == FUNCTION:
            self._product(node, times)
        elif isinstance(node, (*ARITHMETIC, Call)) and "float" in _dtype(node) and _name(node) not in FREE:
            self._count("float_ops", times * _lanes(node))
        for part in _parts(node):
            self._expression(part, times)

    def _product(self, call: Call, times: int) -> None:
        """Of matrices, on tensor cores, if it is one."""
        found = product(call.args[0].value)
        if found:
            self._hidden = max(self._hidden, found.registers)
            self._count("float_ops", times * found.float_ops)
            self._count("tensor_ops", times * found.float_ops)

    def _half_access(self, call: Call, times: int) -> None:
        """Numbers of 16 bits by address, which will be visited as if one of them were loaded."""
        buffer = call.args[-1].args[0].source
        if _half(call) == "vload":
            self._access("loaded", buffer, times * (_lanes(call) - 1))
        else:
            self._access("stored", buffer, times * _lanes(call.args[1]))
            self._access("loaded", buffer, -times)

    def _access(self, what: str, buffer: Any, elements: int) -> None:
        whole = self._views.get(buffer, buffer)
        if whole in self._main_memory:
            self._accessed[whole] += self._count(what, elements * _element(str(buffer.dtype)))

    def _count(self, what: str, number: int) -> int:
        done = round(number * self._share)
        self._counts[what] += done
        return done


# Conditions -----------------------------------------------------------

_COMPUTED: dict[Any, Callable[[Any, Any], Any]] = {
    tirx.Add: np.add,
    tirx.Sub: np.subtract,
    tirx.Mul: np.multiply,
    tirx.FloorDiv: np.floor_divide,
    tirx.FloorMod: np.mod,
    tirx.LT: np.less,
    tirx.LE: np.less_equal,
    tirx.GT: np.greater,
    tirx.GE: np.greater_equal,
    tirx.EQ: np.equal,
    tirx.NE: np.not_equal,
    tirx.And: np.logical_and,
    tirx.Or: np.logical_or,
}


def _share(conditions: list[Any], extents: dict[Any, int]) -> float:
    """The share of all values of the loops' variables for which the conditions hold."""
    used = dict.fromkeys(var for condition in conditions for var in _variables(condition))
    variables = [var for var in used if var in extents]
    shape = [extents[var] for var in variables]
    if not variables or math.prod(shape) > MOST_POINTS:
        return 1.0
    values = dict(zip(variables, np.ix_(*map(np.arange, shape)), strict=True))
    holds = np.ones(shape, bool)
    for condition in conditions:
        with suppress(KeyError):  # one that depends on data is taken to hold
            holds &= _value(condition, values)
    return float(holds.mean())


def _variables(node: Any) -> Iterator[Any]:
    if isinstance(node, tirx.Var):
        yield node
    for part in _parts(node):
        yield from _variables(part)


def _value(node: Any, values: dict[Any, Any]) -> Any:
    """An integer expression or a condition, for all values of its variables at once."""
    if isinstance(node, tirx.Var):
        return values[node]
    if isinstance(node, tirx.IntImm):
        return int(node.value)
    if isinstance(node, tirx.Not):
        return np.logical_not(_value(node.a, values))
    if isinstance(node, tirx.Cast):
        return _value(node.value, values)
    return _COMPUTED[type(node)](_value(node.a, values), _value(node.b, values))


# Expressions ----------------------------------------------------------


def _name(call: Any) -> str:
    return str(getattr(getattr(call, "op", None), "name", ""))


def _called(call: Call) -> str:
    """The function of OpenCL's that is called, if it is one."""
    called = getattr(call.args[0], "value", None) if _name(call).startswith("tirx.call_") else None
    return called if isinstance(called, str) else ""


def _half(call: Call) -> str | None:
    """ "vload" or "vstore" for OpenCL's functions that read and write numbers of 16 bits."""
    called = _called(call)
    return called.partition("_half")[0] if "_half" in called else None


def _parts(node: Any) -> list[Any]:
    """The expressions that an expression is made of."""
    if isinstance(node, TensorLoad):
        return list(node.indices)
    if isinstance(node, Call):
        return list(node.args)
    fields = ("a", "b", "value", "base", "condition", "true_value", "false_value", "body")
    found = [getattr(node, name) for name in fields if hasattr(node, name)]
    return [part for part in found if isinstance(part, Expr)]


def _bytes(buffer: Any) -> int:
    return math.prod(int(extent) for extent in buffer.shape) * _element(str(buffer.dtype))


def _element(dtype: str) -> int:
    """Bytes of one number, or of the vector that a buffer may hold in its place."""
    kind = tvm.DataType(dtype)
    return -(-int(kind.bits) // 8) * int(kind.lanes)


def _dtype(node: Any) -> str:
    return str(getattr(node.ty, "dtype", ""))


def _lanes(node: Any) -> int:
    dtype = _dtype(node)
    return int(tvm.DataType(dtype).lanes) if dtype else 1
