"""CPUs: declared kernels become loops for the target's vectors, and LLVM makes machine code of them.

regions     what a generator makes loops for
precision   with float16, casts where what lies in memory is smaller than what is computed in
layout      channels last, from the first declared kernel to the last
kernels     the rest is legalised and fused as TVM does it
schedules   the best record, the generator's default, or a rule; weights are packed as the loops want them
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import tvm
from tvm import relax
from tvm.ir.transform import Pass
from tvm.relax import transform
from tvm.s_tir.meta_schedule.space_generator import PostOrderApply, ScheduleFn

from relay_patterns import Accepts
from saevit_tvm.backends.base import Backend, Description
from saevit_tvm.compiler import kernels as compiled_kernels
from saevit_tvm.compiler import library, street
from saevit_tvm.compiler.passes import (
    ApplyRecords,
    ExpandKernels,
    FoldConstants,
    LayOutKernels,
    LowerPrecision,
    RemoveNoOps,
    ScheduleTheRest,
    SinkPermutes,
)
from saevit_tvm.compiler.street import Recipe
from saevit_tvm.targets import Target
from schedules.cpu import registry
from schedules.kernels import declared
from schedules.machines.cpus import Isa, isa_of, threads_of

CHANNELS_LAST = {"relax.nn.conv2d": ["NHWC", "HWIO"]}


class Cpu(Backend):
    device = "cpu"
    numbers = (1,)
    flavours = ("static", "shared")

    def accepts(self, recipe: Recipe) -> Accepts:
        isa, threads = isa_of(recipe.target.tvm), threads_of(recipe.target.tvm)
        return lambda spec: registry.takes(spec.laid_out("NHWC"), isa, threads)

    def precision(self, recipe: Recipe) -> list[Pass]:
        return precision(recipe.dtype)

    def layout(self, recipe: Recipe) -> list[Pass]:
        return layout()

    def kernels(self, recipe: Recipe) -> list[Pass]:
        return kernels()

    def schedules(self, recipe: Recipe) -> list[Pass]:
        target, records = recipe.target.tvm, recipe.records
        return schedules(records and records.database, isa_of(target), threads_of(target))

    def executable(self, mod: tvm.IRModule, target: Target, what: str) -> relax.VMExecutable:
        return compiled_kernels.executable(mod, target)

    def space(self, kernel: tvm.IRModule, target: Description) -> Any | None:
        if declared(kernel["main"]) is None:
            return None
        isa = isa_of(target)
        return ScheduleFn(lambda schedule: registry.tilings(schedule.mod, isa), [], [], {})

    def with_loops(self, kernel: tvm.IRModule, target: Description) -> tvm.IRModule:
        return registry.expanded(kernel, isa_of(target), threads_of(target))

    def generating(self, module: tvm.IRModule, target: Description) -> AbstractContextManager[None]:
        return library.generating_code(module)

    def alike(self, one: Description, other: Description) -> bool:
        """The same architecture, the same vector unit.

        A tiling says how many vector registers hold what, so it means the same, and is legal, wherever vectors are as
        wide and as many; cores and caches then move the best tiling by little, and less than not tuning costs. Where
        vectors differ, even AVX2 and AVX-512 at 256 bits, a tiling would spill registers or leave half of them idle:
        the generator's default, which is computed from their number, is the better guess.
        """
        return _arch(one) == _arch(other) and isa_of(one) == isa_of(other)


def precision(dtype: str) -> list[Pass]:
    return [] if dtype == "float32" else [LowerPrecision(dtype), RemoveNoOps(), transform.DeadCodeElimination()]


def layout() -> list[Pass]:
    return [
        LayOutKernels(),
        transform.ConvertLayout(CHANNELS_LAST),
        transform.Normalize(),
        SinkPermutes(),
        RemoveNoOps(),
        FoldConstants(),
        RemoveNoOps(),
        transform.DeadCodeElimination(),
    ]


def kernels() -> list[Pass]:
    # Weights may be stored in whatever order a schedule likes best.
    return [*street.operators(), transform.AttachAttrLayoutFreeBuffers()]


def schedules(database: Any | None, isa: Isa, threads: int) -> list[Pass]:
    return [
        ApplyRecords(database),
        transform.SplitLayoutRewritePreproc(),
        transform.FoldConstant(),
        transform.DeadCodeElimination(),
        ExpandKernels(isa, threads),
        ScheduleTheRest(),
    ]


def default_space() -> Any:
    """MetaSchedule's space for any CPU.

    Not the one that it would choose for this CPU: with VNNI that adds rules for int8 which need `tensor_intrin`.
    """
    return PostOrderApply(sch_rules="llvm", postprocs="llvm", mutator_probs="llvm")


def _arch(description: Description) -> str:
    return str(description.get("mtriple", "")).split("-")[0]
