"""What all GPUs have in common, whatever language their kernels are written in.

    regions     blocks and primitives that there are launches for
    kernels     each becomes a few launches; the rest is legalised and fused as TVM does it; images stay channels first
    schedules   the best record, the default tiling or a rule, all within the limits of the device

What there are no kernels for is left to the rules, operator by operator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm
from tvm.ir.transform import Pass
from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

from relay_patterns import Accepts
from saevit_tvm.backends.base import Backend, Description
from saevit_tvm.backends.launches import check_launches, launches
from saevit_tvm.compiler import street
from saevit_tvm.compiler.passes import ApplyRecords, BindTheRest, ExpandLaunches, LaunchKernels
from saevit_tvm.compiler.street import Compiled, Dump, Recipe, TunableKernel
from saevit_tvm.targets import Target
from schedules.gpu import plan, registry
from schedules.machines.gpus import limits_of


class Gpu(Backend):
    is_gpu = True
    has_stand_in = True

    def accepts(self, recipe: Recipe) -> Accepts:
        limits = limits_of(recipe.target.tvm)
        return lambda spec: plan.accepts(spec, limits)

    def kernels(self, recipe: Recipe) -> list[Pass]:
        return [LaunchKernels(limits_of(recipe.target.tvm), recipe.dtype), *street.operators()]

    def schedules(self, recipe: Recipe) -> list[Pass]:
        database = recipe.records and recipe.records.database
        return [ApplyRecords(database), ExpandLaunches(limits_of(recipe.target.tvm)), BindTheRest()]

    def check(self, mod: tvm.IRModule, target: Target) -> None:
        check_launches(mod, limits_of(target.tvm), target.name)

    def tunable(self, kernel: TunableKernel) -> bool:
        """Only a declared kernel: what is scheduled by rule has nothing to search."""
        return registry.kernel_of(kernel.module["main"]) is not None

    def launches(self, compiled: Compiled) -> dict[str, Any]:
        return {"launches": launches(compiled.module)}

    def beside_this_cpu(self, compiled: Compiled) -> Compiled:
        """The same kernels, called alike, from a host part for this machine."""
        target = compiled.target.beside_this_cpu()
        executable = street.assembled(self, compiled.module, target, "kernels", Dump())
        return replace(compiled, executable=executable, target=target, backend=self)

    def space(self, kernel: tvm.IRModule, target: Description) -> Any | None:
        if registry.kernel_of(kernel["main"]) is None:
            return None
        limits = limits_of(target)
        return ScheduleFn(lambda schedule: registry.tilings(schedule.mod, limits), [], [], {})

    def with_loops(self, kernel: tvm.IRModule, target: Description) -> tvm.IRModule:
        return registry.expanded(kernel, limits_of(target))
