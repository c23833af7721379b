"""How short loops are written: in even parts, in turns, in chunks, and what a register tile accumulates in."""

from __future__ import annotations

from collections.abc import Callable

from schedules.cpu.builder import Buffer, Builder, Expr, lanes_of, minimum
from schedules.cpu.microkernel import pieces
from schedules.machines.cpus import Isa

UNROLL = 4  # steps of a reduction in one turn of its loop


def even(total: int, most: int) -> int:
    """The size of the fewest parts that hold at most `most` each."""
    return -(-total // -(-total // most))


def at_a_time(total: int, parts: int, most: int) -> int:
    """What is done in a turn: about evenly in the largest of so many parts, and never more than the smallest has.

    So no part reaches into another: a row that two threads made could differ in its last bit.
    """
    return even(-(-total // parts), min(most, total // parts))


def part(b: Builder, index: Expr, total: int, parts: int) -> tuple[Expr, int]:
    """Where a part begins, and its size, which all of them have: the last ones are moved up to end where all ends.

    With whole numbers of different sizes a loop in the longer ones would take one more turn for a single row.
    """
    size = -(-total // parts)
    return b.compute_once("first", minimum(index * size, total - size)), size


def every(b: Builder, name: str, unrolled: int, count: int, body: Callable[[Expr], None]) -> None:
    """The body for 0 .. count: written out up to `unrolled` times, else a loop."""
    if unrolled >= count:
        for i in range(count):
            body(i)
    else:
        with b.loop(name, count) as i:
            body(i)


def sweep(b: Builder, lanes: int, count: int, body: Callable[[Expr, int], None]) -> None:
    """body(place, width) for `count` neighbours: whole vectors, then narrower ones."""
    whole = count // lanes
    if whole:
        with b.loop("i", whole) as i:
            body(i * lanes, lanes)
    for start, width in pieces(count - whole * lanes, lanes):
        body(whole * lanes + start, width)


def in_turns(b: Builder, name: str, count: int, body: Callable[[Expr], None]) -> None:
    """The body for 0 .. count, a few at a turn: written out as a whole, LLVM would run out of registers."""
    turns = count // UNROLL
    if turns:
        with b.loop(name, turns) as turn:
            for i in range(UNROLL):
                body(turn * UNROLL + i)
    for i in range(turns * UNROLL, count):
        body(i)


def in_chunks(b: Builder, count: int, most: int, body: Callable[[Expr, int], None]) -> None:
    """body(start, size) for chunks of at most `most`: even ones when they are few, else a loop and a rest."""
    chunks = -(-count // most)
    if chunks <= 4:
        start = 0
        for i in range(chunks):
            end = -(-(i + 1) * count // chunks)
            body(start, end - start)
            start = end
        return
    with b.loop("chunk", count // most) as i:
        body(i * most, most)
    if count % most:
        body(count // most * most, count % most)


def widest(isa: Isa, rows: int) -> int:
    """How many vectors may stand beside each other in a tile of so many rows."""
    return max(1, (isa.registers - 1) // (rows + 1))


def accumulators(b: Builder, rows: int, width: int, lanes: int) -> list[list[Buffer]]:
    return [[b.cell("sum", lanes) for _ in range(width)] for _ in range(rows)]


def multiply_add(b: Builder, sums: list[Buffer], value: Expr, factors: list[Expr]) -> None:
    value = b.bind("factor", value)
    for total, factor in zip(sums, factors, strict=True):
        b.store(total, 0, b.load(total, 0, lanes_of(value)) + value * factor)
