"""Passes of our own, one file a concern. Each turns an IRModule into an equivalent one."""

from saevit_tvm.compiler.passes.declare_regions import DeclareRegions
from saevit_tvm.compiler.passes.expand_regions import ExpandRegions
from saevit_tvm.compiler.passes.fold_batch_norm import FoldBatchNorm
from saevit_tvm.compiler.passes.launch_regions import ExpandLaunches, LaunchRegions
from saevit_tvm.compiler.passes.precision import LowerPrecision
from saevit_tvm.compiler.passes.remove_no_ops import RemoveNoOps
from saevit_tvm.compiler.passes.schedule import ApplyRecords, BindTheRest, ScheduleTheRest

__all__ = [
    "ApplyRecords",
    "BindTheRest",
    "DeclareRegions",
    "ExpandLaunches",
    "ExpandRegions",
    "FoldBatchNorm",
    "LaunchRegions",
    "LowerPrecision",
    "RemoveNoOps",
    "ScheduleTheRest",
]
