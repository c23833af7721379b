"""A decent schedule for any kernel that has neither a record nor a generator of its own.

Three rules, first match wins for each block: a reduction along a vectorisable axis gets a register tile, another
reduction runs serially inside parallel spatial loops, and element-wise work is parallel outside and vectorised inside.
"""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

VECTOR = 16
ROWS = 4
UNROLL = 16


class Fallback(s_tir.dlight.ScheduleRule):
    """Schedules every PrimFunc of any shape; never declines."""

    def apply(self, func: tirx.PrimFunc, target: Target, _tunable: bool) -> Schedule:
        schedule = Schedule(func)
        root = schedule.get_sblock("root")
        for block in schedule.get_child_blocks(root):
            _try_inline(schedule, block)
        for block in schedule.get_child_blocks(root):
            _schedule_block(schedule, block)
        return schedule


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
        _serial_reduction(schedule, block, outer, inner)
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


def _serial_reduction(schedule: Schedule, block: SBlockRV, outer: list[LoopRV], inner: list[LoopRV]) -> None:
    if outer:
        schedule.reorder(*outer, *inner)
        schedule.parallel(schedule.fuse(*outer))


def _elementwise(schedule: Schedule, loops: list[LoopRV]) -> None:
    fused = schedule.fuse(*loops)
    task, vector = schedule.split(fused, [None, VECTOR])
    schedule.vectorize(vector)
    schedule.parallel(task)
