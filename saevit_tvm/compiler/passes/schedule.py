"""Every kernel gets a schedule: the tuned one where there is a record, a rule's otherwise.

Each scheduled kernel carries the attribute `saevit.schedule` that says which it was.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.relax import transform
from tvm.s_tir import dlight

from schedules.cpu.fallback import Fallback
from schedules.gpu.fallback import fallback_rules

SCHEDULE = "saevit.schedule"
BY_RULE = "fallback"
IS_SCHEDULED = "tirx.is_scheduled"


@tvm.ir.transform.module_pass(opt_level=0, name="ApplyRecords")
class ApplyRecords:
    """Apply the best record of every kernel that has one."""

    def __init__(self, database: Any | None) -> None:
        self.database = database

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        if self.database is None:
            return mod
        with self.database:
            return _mark(transform.MetaScheduleApplyDatabase()(mod), "tuned")


@tvm.ir.transform.module_pass(opt_level=0, name="ScheduleTheRest")
class ScheduleTheRest:
    """Schedule by rule for a CPU what no record has scheduled."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return _mark(dlight.ApplyDefaultSchedule(Fallback())(mod), BY_RULE)


@tvm.ir.transform.module_pass(opt_level=0, name="BindTheRest")
class BindTheRest:
    """The same for a GPU: bind to work-groups and work-items what no record has."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return _mark(dlight.ApplyDefaultSchedule(*fallback_rules())(mod), BY_RULE)


def _mark(mod: tvm.IRModule, origin: str) -> tvm.IRModule:
    mod = mod.clone()
    for name, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc) and IS_SCHEDULED in func.attrs and SCHEDULE not in func.attrs:
            mod[name] = func.with_attr(SCHEDULE, origin)
    return mod
