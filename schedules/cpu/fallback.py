"""A decent schedule for any kernel that has neither a record nor a generator of its own.

Four rules, first match wins for each block: a reduction along a vectorisable axis gets a register tile, another
reduction runs inside parallel spatial loops, by vectors where its length allows; what reads rows in even steps, if not
all of them in the same places (concatenations, slices, transposes, factors by channel), goes by rows, and other
element-wise work by numbers in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tvm import s_tir, tirx
from tvm.ir.expr import TensorLoad
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.sym import Analyzer
from tvm.target import Target
from tvm_ffi import structural_equal, structural_walk

from schedules.cpu.expressions import quick

VECTOR = 16
NARROW = 4  # numbers in the smallest vector
ROWS = 4
UNROLL = 16
LONGEST_ROW = 2048  # it is written out
COMPARISONS = (tirx.LT, tirx.LE, tirx.GT, tirx.GE)


class Fallback(s_tir.dlight.ScheduleRule):
    """Schedules every PrimFunc of any shape; never declines."""

    def apply(self, func: tirx.PrimFunc, target: Target, _tunable: bool) -> Schedule:
        schedule = Schedule(func)
        root = schedule.get_sblock("root")
        for block in schedule.get_child_blocks(root):
            _try_inline(schedule, block)
        for block in schedule.get_child_blocks(root):
            _schedule_block(schedule, block)
        return Schedule(quick(schedule.mod["main"]))


def _try_inline(schedule: Schedule, block: SBlockRV) -> None:
    for inline in (schedule.compute_inline, schedule.reverse_compute_inline):
        try:
            inline(block)
            return
        except s_tir.ScheduleError:
            continue


def _extent(schedule: Schedule, loop: LoopRV) -> int:
    return int(schedule.get(loop).extent)


def _schedule_block(schedule: Schedule, block: SBlockRV) -> None:
    loops = schedule.get_loops(block)
    if not loops:
        return
    kinds = [int(var.iter_type) for var in schedule.get(block).iter_vars]
    spatial, reduce = tirx.IterVar.DataPar, tirx.IterVar.CommReduce
    if len(kinds) != len(loops) or any(kind not in (spatial, reduce) for kind in kinds):
        return
    outer = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == spatial]
    inner = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == reduce]
    if inner and outer and _extent(schedule, outer[-1]) >= 8:
        _register_tile(schedule, block, outer, inner)
    elif inner:
        _reduction(schedule, block, outer, inner)
    elif len(outer) > 1 and (bounds := _bounds_in_rows(schedule.get(block))) is not None:
        column, width = _column_read_along(schedule.get(block)), _even_vectors(bounds[-1])
        if column is not None and width >= NARROW and not bounds[2:]:
            _by_squares(schedule, outer, outer[column], width)
        else:
            _by_rows(schedule, outer, bounds)
    else:
        _elementwise(schedule, outer)


def _register_tile(schedule: Schedule, block: SBlockRV, outer: list[LoopRV], inner: list[LoopRV]) -> None:
    """A few rows by one or two vectors stay in registers while the reduction runs past them."""
    *before, columns = outer
    column, vector = schedule.split(columns, [None, min(VECTOR, _extent(schedule, columns))])
    tile: list[LoopRV] = []
    if before:
        *before, rows = before
        row, tiled = schedule.split(rows, [None, min(ROWS, _extent(schedule, rows))])
        before, tile = [*before, row], [tiled]
    schedule.reorder(*before, column, *inner, *tile, vector)
    task = schedule.fuse(*before, column)
    schedule.parallel(task)
    for loop in tile:
        schedule.unroll(loop)
    schedule.vectorize(vector)
    start = schedule.decompose_reduction(block, inner[0])
    schedule.vectorize(schedule.get_loops(start)[-1])


def _reduction(schedule: Schedule, block: SBlockRV, outer: list[LoopRV], inner: list[LoopRV]) -> None:
    if not outer:
        return
    schedule.reorder(*outer, *inner)
    partial = _partial_results(schedule, block, inner[-1])
    # There are other loops once the block takes what another has reduced.
    task = schedule.fuse(*schedule.get_loops(block)[: len(outer)])
    schedule.parallel(task)
    if partial is not None:
        schedule.compute_at(partial, task)
        lanes, *serial = schedule.get_loops(partial)[1:]
        schedule.reorder(*serial, lanes)
        schedule.vectorize(lanes)
        start = schedule.decompose_reduction(partial, serial[0])
        schedule.vectorize(schedule.get_loops(start)[-1])


def _partial_results(schedule: Schedule, block: SBlockRV, loop: LoopRV) -> SBlockRV | None:
    """A few vectors of results, each of every so many numbers: one after the other, each would wait for the last."""
    extent = _extent(schedule, loop)
    most = min(ROWS * VECTOR, extent // 2)
    lanes = next((count for count in range(most - most % NARROW, 0, -NARROW) if extent % count == 0), None)
    if lanes is None or len(schedule.get(block).writes) > 1:
        return None
    try:
        return schedule.rfactor(schedule.split(loop, [None, lanes])[1], -1)
    except s_tir.ScheduleError:  # TVM knows no such reduction: the greatest as PyTorch finds it, for one
        return None


def _elementwise(schedule: Schedule, loops: list[LoopRV]) -> None:
    fused = schedule.fuse(*loops)
    task, vector = schedule.split(fused, [None, VECTOR])
    schedule.vectorize(vector)
    schedule.parallel(task)


def _bounds_in_rows(block: s_tir.SBlock) -> list[int] | None:
    """Where in a row it is decided otherwise what is read; None where whole rows gain nothing."""
    last, row = block.iter_vars[-1].var, int(block.iter_vars[-1].dom.extent)
    places = getattr(block.body, "indices", None)  # a block that ends with no store has none
    if not places or not places[-1].same_as(last):
        return None
    within = _within(block)
    # Of places, not of what is read there.
    compared = [each for each in _all_of(COMPARISONS, block.body.value) if not _all_of(TensorLoad, each)]
    compared = [type(each)(within.simplify(each.a), within.simplify(each.b)) for each in compared]
    bounds = [_bound(each, last) for each in compared if _reads(each, last)]
    loads = _places_read(block, within)
    in_order = all(_reads_in_steps(load, last) for load in loads) and None not in bounds
    alike = not bounds and all(structural_equal(load, list(places)) for load in loads)
    cuts = sorted({0, row, *(bound for bound in bounds if bound and 0 < bound < row)})
    long_enough = row >= VECTOR // 2 and row + len(cuts) * VECTOR <= LONGEST_ROW
    return cuts if in_order and not alike and long_enough else None


def _column_read_along(block: s_tir.SBlock) -> int | None:
    """Which other axis has its neighbours side by side where they are read, if rows are written from columns."""
    *others, last = [each.var for each in block.iter_vars]
    within = _within(block)
    for *before, beside in filter(None, _places_read(block, within)):
        if any(_reads(index, last) for index in before):
            for place, var in enumerate(others):
                if _reads(beside, var) and not _reads(within.simplify(beside - var), var):
                    return place
    return None


def _within(block: s_tir.SBlock) -> Analyzer:
    """What knows how far the axes of a block go."""
    within = Analyzer()
    for each in block.iter_vars:
        within.bind(each.var, each.dom)
    return within


def _places_read(block: s_tir.SBlock, within: Analyzer) -> list[list[tirx.PrimExpr]]:
    return [[within.simplify(index) for index in load.indices] for load in _all_of(TensorLoad, block.body.value)]


def _all_of(kind: Any, expr: tirx.PrimExpr) -> list[Any]:
    found: list[Any] = []
    structural_walk(expr, (kind, found.append))
    return found


def _reads(expr: tirx.PrimExpr, var: tirx.Var) -> bool:
    return any(each.same_as(var) for each in _all_of(tirx.Var, expr))


def _reads_in_steps(places: Sequence[tirx.PrimExpr], last: tirx.Var) -> bool:
    """Whether neighbours along a row are the same step apart where they are read, or all the same."""
    return all(_moves_with(index, last) for index in places if _reads(index, last))


def _moves_with(index: tirx.PrimExpr, last: tirx.Var) -> bool:
    while isinstance(index, (tirx.Add, tirx.Sub)) and not _reads(index.b, last):
        index = index.a
    return index.same_as(last)


def _bound(node: tirx.LT | tirx.LE | tirx.GT | tirx.GE, last: tirx.Var) -> int | None:
    """The first place in a row at which a comparison of places with a number changes, if it is one."""
    if node.a.same_as(last) and isinstance(node.b, tirx.IntImm):
        return int(node.b) + isinstance(node, (tirx.LE, tirx.GT))
    if node.b.same_as(last) and isinstance(node.a, tirx.IntImm):
        return int(node.a) + isinstance(node, (tirx.LT, tirx.GE))
    return None


def _by_rows(schedule: Schedule, loops: list[LoopRV], bounds: list[int]) -> None:
    *outer, row = loops
    task = schedule.fuse(*outer)
    if _extent(schedule, task) > 1:
        schedule.parallel(task)
    cuts = {at for low, high in pairwise(bounds) for at in _in_vectors(low, high)} | {bounds[-1]}
    lengths = [high - low for low, high in pairwise(sorted(cuts))]
    parts = schedule.loop_partition(row, [*lengths[:-1], None], preserve_unit_iters=True) if lengths[1:] else [row]
    for part in parts:
        schedule.vectorize(part)


def _even_vectors(row: int) -> int:
    """The longest that divide a row."""
    return next(size for size in range(VECTOR, 0, -1) if row % size == 0)


def _by_squares(schedule: Schedule, loops: list[LoopRV], column: LoopRV, width: int) -> None:
    """A line of the cache is read for some rows at once: it would be gone when the next row comes to it."""
    *outer, row = loops
    part, vector = schedule.split(row, [None, width])
    others = [loop for loop in outer if not loop.same_as(column)]
    schedule.reorder(*others, part, column, vector)
    schedule.parallel(schedule.fuse(*others, part))
    schedule.vectorize(vector)


def _in_vectors(low: int, high: int) -> list[int]:
    """Where each begins: a few vectors at a time, then one, then what is left."""
    rest = high - (high - low) % VECTOR
    many = rest - (rest - low) % (ROWS * VECTOR)
    return [*range(low, many, ROWS * VECTOR), *range(many, rest, VECTOR), rest]
