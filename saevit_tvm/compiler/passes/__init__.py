"""Passes of our own, one file a concern. Each turns an IRModule into an equivalent one."""

from saevit_tvm.compiler.passes.compute_before_concatenating import ComputeBeforeConcatenating
from saevit_tvm.compiler.passes.declare_kernels import DeclareKernels
from saevit_tvm.compiler.passes.deconvolutions import Deconvolutions
from saevit_tvm.compiler.passes.expand_kernels import ExpandKernels
from saevit_tvm.compiler.passes.fold_batch_norm import FoldBatchNorm
from saevit_tvm.compiler.passes.fold_constants import FoldConstants
from saevit_tvm.compiler.passes.keep_tokens import KeepTokens
from saevit_tvm.compiler.passes.launch_kernels import ExpandLaunches, LaunchKernels
from saevit_tvm.compiler.passes.lay_out_kernels import LayOutKernels
from saevit_tvm.compiler.passes.merge_branches import MergeBranches
from saevit_tvm.compiler.passes.precision import LowerPrecision
from saevit_tvm.compiler.passes.remove_no_ops import RemoveNoOps
from saevit_tvm.compiler.passes.schedule import ApplyRecords, BindTheRest, ScheduleTheRest
from saevit_tvm.compiler.passes.shorten_names import ShortenNames
from saevit_tvm.compiler.passes.sink_permutes import SinkPermutes
from saevit_tvm.compiler.passes.take_frames import TakeFrames

__all__ = [
    "ApplyRecords",
    "BindTheRest",
    "ComputeBeforeConcatenating",
    "DeclareKernels",
    "Deconvolutions",
    "ExpandKernels",
    "ExpandLaunches",
    "FoldBatchNorm",
    "FoldConstants",
    "KeepTokens",
    "LaunchKernels",
    "LayOutKernels",
    "LowerPrecision",
    "MergeBranches",
    "RemoveNoOps",
    "ScheduleTheRest",
    "ShortenNames",
    "SinkPermutes",
    "TakeFrames",
]
