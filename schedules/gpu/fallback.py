"""A schedule for any kernel that has none of its own: TVM's rules for GPUs, the first that matches wins."""

from __future__ import annotations

from tvm.s_tir.dlight import ScheduleRule
from tvm.s_tir.dlight import gpu as rules


def fallback_rules() -> list[ScheduleRule]:
    """The special cases before the general ones; the last never declines."""
    return [rules.Matmul(), rules.GEMV(), rules.Reduction(), rules.GeneralReduction(), rules.Fallback()]
