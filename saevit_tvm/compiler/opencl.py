"""The street to an OpenCL device, where it differs from that to a CPU.

    simplify    the same
    regions     SAA, CIFFN, DWSConv and convolutions become a few kernels each, made for GPUs
    precision   the same: regions compute in float32 whatever lies in memory
    kernels     operators become loops, neighbours become one kernel; images stay channels first
    schedules   every kernel gets work-groups and work-items
    library     the same; the kernels go into it as OpenCL C, which the device's own driver compiles

A region for which there are no kernels is left to the rules, operator by operator.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from tvm import relax, tirx
from tvm.ir.transform import Pass
from tvm.relax import transform
from tvm.s_tir import dlight

from relay_patterns import Reading, Region, blocks, fuse_regions, layers
from saevit_tvm.compiler import pipeline
from saevit_tvm.compiler.importer import import_model
from saevit_tvm.compiler.legalize import OPERATORS
from saevit_tvm.compiler.passes.launch_regions import LaunchRegions
from saevit_tvm.compiler.passes.schedule import IS_SCHEDULED, SCHEDULE
from saevit_tvm.errors import CompileError
from saevit_tvm.targets.opencl import OpenCLTarget
from schedules.gpu.fallback import fallback_rules
from schedules.gpu.launch import Limits
from schedules.gpu.regions import lower

if TYPE_CHECKING:
    from saevit_tvm.models.sources import ModelSource
    from saevit_tvm.targets import Target


def regions(candidates: list[Region], limits: Limits) -> list[Pass]:
    def generated(region: Region, reading: Reading) -> bool:
        return lower(region.name, reading.shape, reading.weights, limits) is not None

    return [fuse_regions(candidates, generated)]


def kernels(limits: Limits) -> list[Pass]:
    return [
        LaunchRegions(limits),
        transform.LegalizeOps(OPERATORS),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ]


def schedules() -> list[Pass]:
    return [ScheduleByRule()]


def compile_for_opencl(
    source: ModelSource, target: Target, dump_ir: Path | None, dtype: str = "float32"
) -> pipeline.Compiled:
    """From a PyTorch model to an executable whose kernels are OpenCL C."""
    dump = pipeline._Dump(dump_ir)
    tvm_target, limits = tvm.target.Target(target.tvm), _limits(target)
    mod = dump("import", import_model(source))
    mod = dump("simplify", pipeline.run(mod, pipeline.simplify(), tvm_target))
    mod = pipeline.run(mod, regions(blocks(), limits), tvm_target)
    found, warnings = pipeline._count_regions(mod, source.regions)
    mod = dump("regions", pipeline.run(mod, regions(layers(), limits), tvm_target))
    lowered = [("precision", pipeline.precision(dtype))] if dtype != "float32" else []
    for name, passes in [*lowered, ("kernels", kernels(limits)), ("schedules", schedules())]:
        mod = dump(name, pipeline.run(mod, passes, tvm_target))
    counts, scheduled = pipeline.count_kernels(mod), mod
    mod = dump("library", pipeline.run(mod, pipeline.virtual_machine(), tvm_target))
    try:
        with tvm.transform.PassContext(opt_level=3):
            executable = relax.build(mod, tvm_target, relax_pipeline=None)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CompileError(f"TVM cannot make OpenCL kernels of {source.name}: {lines[-1]}") from error
    return pipeline.Compiled(executable, scheduled, target, counts, found, None, warnings)


def _limits(target: Target) -> Limits:
    assert isinstance(target, OpenCLTarget)
    return Limits(target.tvm["max_num_threads"], target.tvm["max_shared_memory_per_block"], target.wave)


@tvm.ir.transform.module_pass(opt_level=0, name="ScheduleByRule")
class ScheduleByRule:
    """Bind every kernel to work-groups and work-items, and note on it that a rule did."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        mod = dlight.ApplyDefaultSchedule(*fallback_rules())(mod).clone()
        for name, func in list(mod.functions_items()):
            if isinstance(func, tirx.PrimFunc) and IS_SCHEDULED in func.attrs and SCHEDULE not in func.attrs:
                mod[name] = func.with_attr(SCHEDULE, "fallback")
        return mod
