"""Writing loops down: a few lines over TVM's TIR constructors.

A `Builder` holds the statement list of the scope being written; loops and branches are context managers. Buffers are
flat, so that every address is an explicit sum; vectors are loads and stores of several lanes at one address.

Arithmetic has one type, and what lies in memory may have another: loads and stores convert between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx

Expr = Any  # a TIR expression or a Python number
Buffer = Any

_KINDS = {"serial": tirx.ForKind.SERIAL, "parallel": tirx.ForKind.PARALLEL}


class Builder:
    """Builds one PrimFunc that computes in `dtype` on parameters that are `stored` in the same type or in another."""

    def __init__(self, dtype: str = "float32", stored: str = "float32") -> None:
        self.dtype, self.stored = dtype, stored
        self._scopes: list[list[tirx.Stmt]] = [[]]
        self._params: list[Buffer] = []

    def param(self, name: str, shape: Sequence[int], dtype: str | None = None) -> Buffer:
        """A parameter of the function, and a flat view of it to load from and store to."""
        dtype = dtype or self.stored
        size = 1
        for extent in shape:
            size *= extent
        whole = tirx.decl_buffer(tuple(shape), dtype, name)
        self._params.append(whole)
        flat = tirx.decl_buffer((size,), dtype, f"{name}_flat", data=whole.data)
        self._emit(tirx.DeclBuffer(flat, data=whole.data))
        return flat

    def alloc(self, name: str, size: int, dtype: str | None = None) -> Buffer:
        """Scratch memory that lives as long as the scope being written."""
        # LLVM places what is less than a kilobyte. Of scope "local", TVM would ask its runtime for all of it.
        buffer = tirx.decl_buffer((size,), dtype or self.dtype, name, scope="global")
        self._emit(tirx.AllocBuffer(buffer))
        return buffer

    def cell(self, name: str, size: int, dtype: str | None = None) -> Buffer:
        """A few numbers that change, in registers."""
        return self.alloc(name, size, dtype)

    def load(self, buffer: Buffer, index: Expr, lanes: int = 1, dtype: str | None = None) -> Expr:
        """Some neighbours, in the type of the arithmetic or in another."""
        return cast(tirx.BufferLoad(buffer, [_span(index, lanes)]), dtype or self.dtype)

    def store(self, buffer: Buffer, index: Expr, value: Expr) -> None:
        value = cast(value, str(buffer.dtype))
        self._emit(tirx.BufferStore(buffer, value, [_span(index, lanes_of(value))]))

    def prefetch(self, buffer: Buffer, index: Expr) -> None:
        """Ask the memory for what will be read soon. It may lie beyond the buffer."""
        place = tirx.address_of(tirx.BufferLoad(buffer, [integer(index)]))
        self._emit(tirx.Evaluate(tirx.call_intrin("", "tirx.prefetch", place, 0, 2, 1)))

    def splat(self, value: Expr, lanes: int) -> Expr:
        """One number in every lane."""
        return splat(value, lanes, self.dtype)

    def bind(self, name: str, value: Expr) -> Expr:
        """A name for a value that is computed once."""
        if isinstance(value, (int, tirx.IntImm)):
            return value
        var = tirx.Var(name, value.ty)
        self._emit(tirx.Bind(var, value))
        return var

    def compute_once(self, name: str, value: Expr) -> Expr:
        """A value that is computed once and that TVM does not look into.

        TVM's simplifier takes minutes over nested divisions, minima and maxima that LLVM handles at once. And what
        `bind` has named it puts back in each of its places, if it is computed from names alone: of a polynomial's
        square it makes four polynomials.
        """
        if isinstance(value, (int, tirx.IntImm)):
            return value
        lanes, dtype = lanes_of(value), str(value.ty.dtype.with_lanes(1))
        cell = self.cell(name, lanes, dtype)
        self.store(cell, 0, value)
        return self.load(cell, 0, lanes, dtype)

    @contextmanager
    def loop(self, name: str, extent: Expr, kind: str = "serial") -> Iterator[Expr]:
        """`for name in range(extent)`; no loop at all where the extent is the number 1."""
        if isinstance(extent, int) and extent == 1:
            yield 0
            return
        var = tirx.Var(name, "int32")
        with self._scope() as body:
            yield var
        self._emit(tirx.For(var, integer(0), integer(extent), _KINDS[kind], _sequence(body)))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        with self._scope() as body:
            yield
        self._emit(tirx.IfThenElse(condition, _sequence(body), None))

    def function(self, name: str) -> tirx.PrimFunc:
        (body,) = self._scopes
        func = tirx.PrimFunc(self._params, _sequence(body))
        return func.with_attrs({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})

    @contextmanager
    def _scope(self) -> Iterator[list[tirx.Stmt]]:
        body: list[tirx.Stmt] = []
        self._scopes.append(body)
        try:
            yield body
        finally:
            self._scopes.pop()

    def _emit(self, stmt: tirx.Stmt) -> None:
        self._scopes[-1].append(stmt)


def lanes_of(value: Expr) -> int:
    """How many lanes a value has."""
    return int(value.ty.dtype.lanes) if hasattr(value, "ty") else 1


def cast(value: Expr, dtype: str) -> Expr:
    """The same numbers, lane by lane, in another type."""
    lanes = lanes_of(value)
    wanted = dtype if lanes == 1 else f"{dtype}x{lanes}"
    return value if str(value.ty.dtype) == wanted else tirx.Cast(wanted, value)


def splat(value: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """One number in every lane."""
    if isinstance(value, (int, float)):
        value = tirx.const(value, dtype)
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def integer(value: Expr) -> Expr:
    """A number as an expression, so that comparing it makes one too."""
    return tirx.const(value, "int32") if isinstance(value, int) else value


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def fill(b: Builder, lanes: int, buffer: Buffer, start: Expr, count: int) -> None:
    """Zeros in `count` elements."""
    _sweep(b, lanes, count, lambda i, width: b.store(buffer, start + i, b.splat(0.0, width)))


def copy(b: Builder, lanes: int, source: Buffer, at: Expr, target: Buffer, to: Expr, count: int) -> None:
    """`count` elements from `source[at..]` to `target[to..]`."""
    _sweep(b, lanes, count, lambda i, width: b.store(target, to + i, b.load(source, at + i, width)))


def _sweep(b: Builder, lanes: int, count: int, body: Callable[[Expr, int], None]) -> None:
    """body(place, width) for whole vectors, then for what is left one by one."""
    whole = count // lanes
    if whole:
        with b.loop("i", whole) as i:
            body(i * lanes, lanes)
    for i in range(whole * lanes, count):
        body(i, 1)


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller of two integers, folded where both are known."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(integer(a), integer(b))


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger of two integers, folded where both are known."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(integer(a), integer(b))


def _span(index: Expr, lanes: int) -> Expr:
    return integer(index) if lanes == 1 else tirx.Ramp(integer(index), integer(1), lanes)


def _sequence(body: list[tirx.Stmt]) -> tirx.Stmt:
    return body[0] if len(body) == 1 else tirx.SeqStmt(body)
