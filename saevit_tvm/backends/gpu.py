"""What all GPUs have in common, whatever language their kernels are written in.

    regions     SAA, CIFFN, DWSConv, convolutions and the head become a few launches each
    kernels     the rest is legalised and fused as TVM does it; images stay channels first
    schedules   the best record, the default tiling or a rule, all within the limits of the device

A region for which there are no kernels is left to the rules, operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.ir.transform import Pass
from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

from relay_patterns import Reading, Region
from saevit_tvm.backends.base import Backend, Description
from saevit_tvm.backends.launches import check_launches, launches
from saevit_tvm.compiler import street
from saevit_tvm.compiler.passes import ApplyRecords, BindTheRest, ExpandLaunches, LaunchRegions
from saevit_tvm.compiler.street import Compiled, Recipe, TunableKernel
from saevit_tvm.targets import Target
from schedules.gpu import declare
from schedules.gpu.devices import limits_of
from schedules.gpu.regions import lower


class Gpu(Backend):
    is_gpu = True

    def generates(self, recipe: Recipe) -> Callable[[Region, Reading], bool]:
        limits = limits_of(recipe.target.tvm)
        return lambda region, reading: lower(region.name, reading.shape, reading.weights, limits) is not None

    def kernels(self, recipe: Recipe) -> list[Pass]:
        return [LaunchRegions(limits_of(recipe.target.tvm), recipe.dtype), *street.operators()]

    def schedules(self, recipe: Recipe) -> list[Pass]:
        database = recipe.records and recipe.records.database
        return [ApplyRecords(database), ExpandLaunches(limits_of(recipe.target.tvm)), BindTheRest()]

    def check(self, mod: tvm.IRModule, target: Target) -> None:
        check_launches(mod, limits_of(target.tvm), target.name)

    def tunable(self, kernel: TunableKernel) -> bool:
        """Only a declared kernel: what is scheduled by rule has nothing to search."""
        return declare.kernel_of(kernel.module["main"]) is not None

    def launches(self, compiled: Compiled) -> dict[str, Any]:
        return {"launches": launches(compiled.module)}

    def space(self, kernel: tvm.IRModule, target: Description) -> Any | None:
        if declare.kernel_of(kernel["main"]) is None:
            return None
        limits = limits_of(target)
        return ScheduleFn(lambda schedule: declare.tilings(schedule.mod, limits), [], [], {})

    def with_loops(self, declared: tvm.IRModule, target: Description) -> tvm.IRModule:
        return declare.expanded(declared, limits_of(target))
