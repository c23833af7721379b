"""A schedule for any kernel that has none of its own: TVM's rules for GPUs, the first that matches wins."""

from __future__ import annotations

from typing import Any

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
            return self.rule.apply(func, target, tunable)
        except Exception:  # of a schedule that does not fit, in whatever way
            return None
