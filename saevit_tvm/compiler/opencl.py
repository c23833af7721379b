"""The street to an OpenCL device, where it differs from that to a CPU.

    simplify    the same
    regions     SAA, CIFFN, DWSConv, convolutions and the head become a few kernels each, made for GPUs
    kernels     operators become loops, neighbours become one kernel; images stay channels first
    schedules   kernels that were tuned take their best tiling, all others the default one or a rule, within limits
    library     the same; the kernels go into it as OpenCL C, which the device's own driver compiles

A region for which there are no kernels is left to the rules, operator by operator.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx
from tvm.ir.transform import Pass
from tvm.s_tir import dlight

from relay_patterns import Reading, Region, blocks, fuse_regions, layers
from saevit_tvm.compiler import library, pipeline
from saevit_tvm.compiler.importer import import_model
from saevit_tvm.compiler.launches import check_launches
from saevit_tvm.compiler.passes.launch_regions import ExpandLaunches, LaunchRegions
from saevit_tvm.compiler.passes.schedule import IS_SCHEDULED, SCHEDULE, ApplyRecords
from schedules.gpu.declare import kernel_of
from schedules.gpu.devices import Limits, limits_of
from schedules.gpu.fallback import fallback_rules
from schedules.gpu.regions import lower

if TYPE_CHECKING:
    from saevit_tvm.compiler.device_code import DeviceCode
    from saevit_tvm.models.sources import ModelSource
    from saevit_tvm.targets import Target

_SOURCE_HOOK = "tvm_callback_opencl_postproc"  # what TVM calls with every kernel's source
_READ_OF_IMAGE = re.compile(r"\bread_image[fh]\((\w+),")
_DECLARATION = re.compile(r"^__kernel [^{;]*;\n", re.MULTILINE)


def regions(candidates: list[Region], limits: Limits) -> list[Pass]:
    def generated(region: Region, reading: Reading) -> bool:
        return lower(region.name, reading.shape, reading.weights, limits) is not None

    return [fuse_regions(candidates, generated)]


def kernels(limits: Limits, dtype: str) -> list[Pass]:
    return [LaunchRegions(limits, dtype), *pipeline.operators()]


def schedules(limits: Limits, database: Any | None) -> list[Pass]:
    return [ApplyRecords(database), ExpandLaunches(limits), ScheduleByRule()]


@dataclass(frozen=True)
class Scheduled:
    """A module whose kernels all have their loops, and what is worth knowing about how it came to be."""

    module: tvm.IRModule
    counts: dict[str, int]
    regions: dict[str, dict[str, int]]
    warnings: list[str]

    def compiled(
        self, executable: Any, target: Target, records: Any | None, code: DeviceCode | None = None
    ) -> pipeline.Compiled:
        digest, used = (records.digest, records.used) if records else (None, [])
        warnings = self.warnings + (code.warnings if code else [])
        return pipeline.Compiled(
            executable, self.module, target, self.counts, self.regions, digest, warnings, used, code
        )


def scheduled(
    source: ModelSource,
    target: Target,
    records: Any | None,
    dump: pipeline._Dump,
    dtype: str,
) -> Scheduled:
    """From a PyTorch model to kernels for the device, whatever language they will be written in."""
    tvm_target, limits = tvm.target.Target(target.tvm), limits_of(target.tvm)
    mod = dump("import", import_model(source))
    mod = dump("simplify", pipeline.run(mod, pipeline.simplify(), tvm_target))
    mod = pipeline.run(mod, regions(blocks(), limits), tvm_target)
    found, warnings = pipeline._count_regions(mod, source.regions)
    mod = dump("regions", pipeline.run(mod, regions(layers(), limits), tvm_target))
    mod = dump("kernels", pipeline.run(mod, kernels(limits, dtype), tvm_target))
    scheduling = schedules(limits, records and records.database)
    mod = dump("schedules", pipeline.run(mod, scheduling, tvm_target))
    check_launches(mod, limits, target.name)
    return Scheduled(mod, pipeline.count_kernels(mod), found, warnings)


def compile_for_opencl(
    source: ModelSource, target: Target, records: Any | None, dump_ir: Path | None, dtype: str
) -> pipeline.Compiled:
    """From a PyTorch model to an executable whose kernels are OpenCL C."""
    dump, tvm_target = pipeline._Dump(dump_ir), tvm.target.Target(target.tvm)
    made = scheduled(source, target, records, dump, dtype)
    mod = dump("library", pipeline.run(made.module, pipeline.virtual_machine(), tvm_target))
    with library.told_plainly(f"OpenCL kernels of {source.name}"), generating_kernels(limits_of(target.tvm)):
        executable = relax.build(mod, tvm_target, relax_pipeline=None)
    return made.compiled(executable, target, records)


def kernels_to_tune(source: ModelSource, target: Target, dtype: str) -> list[pipeline.Kernel]:
    """The declared kernels of a model. What is scheduled by rule has nothing to search."""
    tvm_target, limits = tvm.target.Target(target.tvm), limits_of(target.tvm)
    mod = import_model(source)
    for passes in (pipeline.simplify(), regions([*blocks(), *layers()], limits), kernels(limits, dtype)):
        mod = pipeline.run(mod, passes, tvm_target)
    found = pipeline.extracted(mod, tvm_target)
    return [kernel for kernel in found if kernel_of(kernel.module["main"]) is not None]


@contextlib.contextmanager
def generating_kernels(limits: Limits) -> Iterator[None]:
    """The setting in which kernels become OpenCL C, for a library and for a measurement alike."""
    import tvm_ffi

    tvm_ffi.register_global_func(_SOURCE_HOOK, functools.partial(_adapted, limits), override=True)
    try:
        with tvm.transform.PassContext(opt_level=3):
            yield
    finally:
        tvm_ffi.remove_global_func(_SOURCE_HOOK)


def _adapted(limits: Limits, source: str, _target: Any) -> str:
    """One kernel as it is to be compiled: without what TVM says too much, and with what it has no words for."""
    # Every kernel comes with declarations of all others, and none calls another.
    source = _with_images(_DECLARATION.sub("", source))
    return source if limits.half else _without_refusal(source)


def _with_images(source: str) -> str:
    """What is read as an image is one, and not a buffer; the plugin wants to know of which numbers."""
    for name in set(_READ_OF_IMAGE.findall(source)):
        buffer = rf"__global (\w+)\* restrict {name}\b"
        source = re.sub(buffer, rf"__read_only image1d_buffer_t {name} /* of \1 */", source)
    return source


def _without_refusal(source: str) -> str:
    """TVM lets every kernel that mentions float16 refuse to be compiled by a driver without arithmetic in it.

    For a device without, ours only load and store such numbers, by functions that every driver has.
    """
    return "\n".join(line for line in source.splitlines() if not line.startswith("#error")) + "\n"


@tvm.ir.transform.module_pass(opt_level=0, name="ScheduleByRule")
class ScheduleByRule:
    """Bind every kernel to work-groups and work-items, and note on it that a rule did."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        mod = dlight.ApplyDefaultSchedule(*fallback_rules())(mod).clone()
        for name, func in list(mod.functions_items()):
            if isinstance(func, tirx.PrimFunc) and IS_SCHEDULED in func.attrs and SCHEDULE not in func.attrs:
                mod[name] = func.with_attr(SCHEDULE, "fallback")
        return mod
