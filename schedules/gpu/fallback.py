"""A schedule for any kernel that has none of its own: TVM's rules for GPUs, the first that matches wins."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.dlight import ScheduleRule
from tvm.s_tir.dlight import gpu as rules


def fallback_rules() -> list[ScheduleRule]:
    """The special cases before the general ones; the last never declines."""
    special = (rules.Matmul(), rules.GEMV(), rules.Reduction(), rules.GeneralReduction())
    return [*map(Declining, special), rules.Fallback()]


class Declining(ScheduleRule):
    """A rule that declines where it would fail: some take a sum over one axis for a product with a vector."""

    def __init__(self, rule: ScheduleRule) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        try:
            found = self.rule.apply(func, target, tunable)
            if found is not None:
                lowered(found.mod["main"], target)
            return found
        except Exception:  # of a schedule that does not fit, or that TVM cannot lower: sums over six of six, say
            return None


def lowered(func: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc:
    """A scheduled function with buffers as large as they will be: rules schedule blocks, which allocate whole ones."""
    if not isinstance(func.body, s_tir.SBlockRealize):
        return func
    passes = [
        s_tir.transform.LowerCrossThreadReduction(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerOpaqueBlock(),
        # Work-items that sum up together do so in local memory, which appears only here.
        tirx.transform.BindTarget(target),
        tirx.transform.FlattenBuffer(),
        s_tir.transform.LowerThreadAllreduce(),
    ]
    return tvm.transform.Sequential(passes)(tvm.IRModule({"main": func}))["main"]
