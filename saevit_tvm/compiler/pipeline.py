"""The one list of passes between a PyTorch model and a library, in order, in phases.

    simplify    inference only: BatchNorm folded, constants folded, nothing that moves no data
    regions     SAA, CIFFN, DWSConv (and convolutions, and the head) become one call each
    precision   with another dtype than float32: casts where what lies in memory is smaller than what is computed in
    layout      channels last
    kernels     operators become loops, neighbours become one kernel
    records     kernels that were tuned take their best schedule; the rest take a generator's default or a rule
    library     memory planned, bytecode and machine code

`dump_ir` writes the module after every phase. The kernels that tuning searches are those of the phase `kernels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax
from tvm.ir.transform import Pass
from tvm.relax import transform

from relay_patterns import Reading, Region, blocks, fuse_regions, layers, missed, read_composite
from saevit_tvm.compiler import library
from saevit_tvm.compiler.importer import import_model
from saevit_tvm.compiler.legalize import OPERATORS
from saevit_tvm.compiler.passes import (
    ApplyRecords,
    DeclareRegions,
    ExpandRegions,
    FoldBatchNorm,
    LowerPrecision,
    RemoveNoOps,
    ScheduleTheRest,
)
from schedules.cpu.isa import Isa, isa_of
from schedules.regions import supported

if TYPE_CHECKING:
    from saevit_tvm.compiler.device_code import DeviceCode
    from saevit_tvm.models.sources import ModelSource
    from saevit_tvm.targets import Target
    from saevit_tvm.tuning.records import Records

CHANNELS_LAST = {"relax.nn.conv2d": ["NHWC", "HWIO"]}


def simplify() -> list[Pass]:
    return [
        transform.CanonicalizeBindings(),
        RemoveNoOps(),
        transform.FoldConstant(),
        FoldBatchNorm(),
        RemoveNoOps(),
        transform.DeadCodeElimination(),
    ]


def regions(candidates: list[Region], isa: Isa) -> list[Pass]:
    def generated(region: Region, reading: Reading) -> bool:
        return supported(region.name, reading.shape, reading.weights, isa)

    return [fuse_regions(candidates, generated)]


def precision(dtype: str) -> list[Pass]:
    return [] if dtype == "float32" else [LowerPrecision(dtype), RemoveNoOps(), transform.DeadCodeElimination()]


def layout(dtype: str = "float32") -> list[Pass]:
    return [
        DeclareRegions(dtype),
        transform.ConvertLayout(CHANNELS_LAST),
        transform.Normalize(),
        RemoveNoOps(),
        transform.FoldConstant(),
        RemoveNoOps(),
        transform.DeadCodeElimination(),
    ]


def operators() -> list[Pass]:
    """What is no region: operators become loops, neighbours become one kernel."""
    return [
        transform.LegalizeOps(OPERATORS),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ]


def kernels() -> list[Pass]:
    # Weights may be stored in whatever order a schedule likes best.
    return [*operators(), transform.AttachAttrLayoutFreeBuffers()]


def apply_records(database: Any | None, isa: Isa, threads: int) -> list[Pass]:
    return [
        ApplyRecords(database),
        transform.SplitLayoutRewritePreproc(),
        transform.FoldConstant(),
        transform.DeadCodeElimination(),
        ExpandRegions(isa, threads),
        ScheduleTheRest(),
    ]


def memory_plan(capture: bool = False) -> list[Pass]:
    """Calls of kernels on a few storages, which all tensors of an inference share; `capture` as a CUDA graph."""
    return [
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        *([transform.RewriteCUDAGraph()] if capture else []),
        transform.LowerAllocTensor(),
    ]


def virtual_machine(capture: bool = False) -> list[Pass]:
    """Bytecode that follows the memory plan.

    The virtual machine takes these storages from a pooled allocator and gives them back after every inference, so
    that from the second one on nothing is allocated, save for an output that the caller still holds. Scratch memory
    of a kernel comes from a pool of its thread, likewise.
    """
    return [
        *memory_plan(capture),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]


@dataclass(frozen=True)
class Compiled:
    """An executable and what is worth knowing about how it came to be."""

    executable: relax.VMExecutable
    module: tvm.IRModule  # what it was made from: scheduled kernels, and the graph that calls them
    target: Target
    kernels: dict[str, int]
    regions: dict[str, dict[str, int]]
    records_digest: str | None
    warnings: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)  # which folders of the store served how many kernels
    code: DeviceCode | None = None  # of the kernels, where they are not the host's

    def export(self, path: Path) -> None:
        """Link the bare library, weights inside."""
        library.link(self.executable, self.target, path, self.code)


@dataclass(frozen=True)
class Kernel:
    """One kernel that tuning can search, and how often one inference calls it."""

    name: str
    weight: int
    module: tvm.IRModule


def compile_model(
    source: ModelSource,
    target: Target,
    *,
    records: Path | None = None,
    use_tuned: bool = True,
    dump_ir: Path | None = None,
    dtype: str = "float32",
) -> Compiled:
    """The whole street: from a PyTorch model to an executable for the target."""
    target = target.computing_in(dtype)
    opened = _open_records(records, target) if use_tuned else None
    if target.kind == "cuda":
        from saevit_tvm.compiler.cuda import compile_for_cuda

        return compile_for_cuda(source, target, opened, dump_ir, dtype)
    if target.kind != "llvm":
        from saevit_tvm.compiler.opencl import compile_for_opencl

        return compile_for_opencl(source, target, opened, dump_ir, dtype)
    dump = _Dump(dump_ir)
    tvm_target, isa = tvm.target.Target(target.tvm), isa_of(target.tvm)
    mod = dump("import", import_model(source))
    mod = dump("simplify", run(mod, simplify(), tvm_target))
    mod = run(mod, regions(blocks(), isa), tvm_target)
    found, warnings = _count_regions(mod, source.regions)
    mod = dump("regions", run(mod, regions(layers(), isa), tvm_target))
    for name, passes in [
        *([("precision", precision(dtype))] if dtype != "float32" else []),
        ("layout", layout(dtype)),
        ("kernels", kernels()),
        ("records", apply_records(opened and opened.database, isa, _threads(target))),
    ]:
        mod = dump(name, run(mod, passes, tvm_target))
    counts, scheduled = count_kernels(mod), mod
    mod = dump("library", run(mod, virtual_machine(), tvm_target))
    with library.generating_code(mod):
        executable = relax.build(mod, tvm_target, relax_pipeline=None)
    digest, used = (opened.digest, opened.used) if opened else (None, [])
    return Compiled(executable, scheduled, target, counts, found, digest, warnings, used)


def kernels_to_tune(source: ModelSource, target: Target, dtype: str = "float32") -> list[Kernel]:
    """Every distinct kernel that the model needs on the target, most used first."""
    target = target.computing_in(dtype)
    if target.kind != "llvm":
        from saevit_tvm.compiler import opencl  # CUDA's kernels are the same declarations

        return opencl.kernels_to_tune(source, target, dtype)
    tvm_target = tvm.target.Target(target.tvm)
    mod = import_model(source)
    isa = isa_of(target.tvm)
    street = simplify(), regions([*blocks(), *layers()], isa), precision(dtype), layout(dtype), kernels()
    for passes in street:
        mod = run(mod, passes, tvm_target)
    return extracted(mod, tvm_target)


def extracted(mod: tvm.IRModule, target: tvm.target.Target) -> list[Kernel]:
    """The kernels of a module that have no schedule yet."""
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    tasks = extract_tasks(mod, target)
    found = [Kernel(task.task_name, int(task.weight), task.dispatched[0]) for task in tasks]
    return sorted(found, key=lambda kernel: (-kernel.weight, kernel.name))


def run(mod: tvm.IRModule, passes: Iterable[Pass], target: tvm.target.Target) -> tvm.IRModule:
    """Run passes with the target in scope, as scheduling needs it."""
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(list(passes))(mod)


def count_kernels(mod: tvm.IRModule) -> dict[str, int]:
    """How many kernels there are, and where each one's schedule came from."""
    origins = Counter(
        str(func.attrs["saevit.schedule"]) for func in mod.functions.values() if "saevit.schedule" in func.attrs
    )
    counts = {name: origins.get(name, 0) for name in ("tuned", "scheduled", "fallback")}
    return {"total": sum(counts.values()), **counts}


def _count_regions(mod: tvm.IRModule, expected: dict[str, int]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Regions found beside those that the model has, and a warning for each kind that is short."""
    composites = [read_composite(func) for func in mod.functions.values() if isinstance(func, relax.Function)]
    names = Counter(composite[0].name for composite in composites if composite)
    counts = {name: {"found": names[name], "expected": count} for name, count in expected.items()}
    warnings = []
    for name, count in counts.items():
        if count["found"] < count["expected"]:
            why = missed(mod["main"], name) or f"nothing in the graph begins like {name}"
            warnings.append(f"{count['found']} of {count['expected']} {name} regions were found: {why}.")
    return counts, warnings


def _threads(target: Target) -> int:
    """How many threads the work is cut for: the target's cores, or a number that most boards divide."""
    return int(target.tvm.get("num-cores", 4))


def _open_records(root: Path | None, target: Target) -> Records:
    from saevit_tvm.tuning.records import open_records

    return open_records(root, target)


class _Dump:
    """Writes the module after each phase into a folder, numbered so that they sort in order."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, phase: str, mod: tvm.IRModule) -> tvm.IRModule:
        if self._folder is not None:
            self.text(f"{phase}.py", mod.script(show_meta=False) + "\n")
        return mod

    def text(self, name: str, text: str) -> None:
        """One more file: a module, or what is none, such as the source of kernels."""
        if self._folder is not None:
            (self._folder / f"{self._count}-{name}").write_text(text)
            self._count += 1
