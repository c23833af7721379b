"""The one street from a model to a library, for every kind of target, for building and for tuning alike.

    import      the model as one Relax function, weights as constants; before it, what makes its input of a frame
    simplify    inference only: BatchNorm folded, constants folded, nothing that moves no data
    regions     blocks, then primitives with all that follows them, become one call each: a spec in logical form
    precision   casts where what lies in memory is smaller than what is computed in
    layout      as the target likes it: channels last on a CPU
    kernels     operators become loops, neighbours become one kernel; here tuning takes the kernels that it searches
    schedules   kernels that were tuned take their best schedule; the rest take a generator's default or a rule
    library     memory planned, and code for the target

A backend arranges the phases from `regions` on; one without passes is left out. The street imports no backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import tvm
from tvm import relax
from tvm.ir.transform import Pass
from tvm.relax import transform

from relay_patterns import Accepts, find_blocks, find_primitives, missed
from saevit_tvm.compiler import parsing
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.join import joined
from saevit_tvm.compiler.legalize import OPERATORS
from saevit_tvm.compiler.passes import (
    ComputeBeforeConcatenating,
    DeclareKernels,
    Deconvolutions,
    FoldBatchNorm,
    FoldConstants,
    KeepTokens,
    MergeBranches,
    RemoveNoOps,
    ShortenNames,
    TakeFrames,
)
from saevit_tvm.compiler.passes.kernel_calls import kernels_called, read
from saevit_tvm.compiler.passes.schedule import BY_RULE, SCHEDULE
from saevit_tvm.compiler.work import Work, multiply_adds
from saevit_tvm.runtime.manifest import entry
from saevit_tvm.support import progress

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource
    from saevit_tvm.targets import Target

parsing.make_quick()


class Records(Protocol):
    """What a build looks schedules up in. Whoever opens them passes them in: the compiler knows no store."""

    @property
    def database(self) -> Any: ...

    @property
    def digest(self) -> str | None: ...

    @property
    def used(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Recipe:
    """What is built, for what, in which type, and from which records."""

    source: ModelSource
    target: Target
    dtype: str = "float32"
    records: Records | None = None


class DeviceCode(Protocol):
    """Compiled kernels that are not the host's."""

    @property
    def report(self) -> dict[str, Any]: ...

    @property
    def source(self) -> str: ...

    @property
    def warnings(self) -> list[str]: ...


class Phases(ABC):
    """What the street needs of a backend: the passes of its phases, and code at the end."""

    settings: ClassVar[Mapping[str, Any]] = {}  # TVM's, for the phase `library`

    @abstractmethod
    def accepts(self, recipe: Recipe) -> Accepts:
        """Whether there are kernels for a spec in logical form; what has none is left to the rules."""

    def precision(self, recipe: Recipe) -> list[Pass]:
        return []

    def layout(self, recipe: Recipe) -> list[Pass]:
        return []

    @abstractmethod
    def kernels(self, recipe: Recipe) -> list[Pass]: ...

    @abstractmethod
    def schedules(self, recipe: Recipe) -> list[Pass]: ...

    def check(self, mod: tvm.IRModule, target: Target) -> None:
        """Raise CompileError for a scheduled kernel that the device would refuse."""

    def library(self) -> list[Pass]:
        return virtual_machine()

    @abstractmethod
    def executable(self, mod: tvm.IRModule, target: Target, what: str) -> relax.VMExecutable:
        """Code for the host and for the device; `what` it is of, for an error."""

    def device_code(self, executable: relax.VMExecutable, target: Target, dump: Dump) -> DeviceCode | None:
        """Kernels compiled by another compiler than TVM's."""
        return None

    def tunable(self, kernel: TunableKernel) -> bool:
        return True

    @abstractmethod
    def link(self, compiled: Compiled, path: Path) -> None:
        """Write the bare library, or what the target has in its place."""


class Phase(NamedTuple):
    name: str
    run: Callable[[Any], tvm.IRModule]


@dataclass
class Found:
    """Regions found beside those that the model has, a warning for each kind that is short, and what is left."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    work: Work = field(default_factory=Work)


def street(backend: Phases, recipe: Recipe, found: Found) -> list[Phase]:
    """All phases up to scheduled kernels, in order; what regions there are is noted in `found` on the way."""
    target = tvm.target.Target(recipe.target.tvm)
    accepts = backend.accepts(recipe)

    def regions(mod: tvm.IRModule) -> tvm.IRModule:
        asked = multiply_adds(mod)
        mod = run(mod, [DeclareKernels(find_blocks, accepts)], target)
        _count_regions(mod, recipe.source.regions, found)
        left = [Deconvolutions(), KeepTokens(), RemoveNoOps(), DeclareKernels(find_primitives, accepts)]
        mod = run(mod, left, target)
        found.work = Work(asked, multiply_adds(mod))
        return mod

    def schedules(mod: tvm.IRModule) -> tvm.IRModule:
        mod = run(mod, backend.schedules(recipe), target)
        backend.check(mod, recipe.target)
        return mod

    arranged = {
        "precision": backend.precision(recipe),
        "layout": backend.layout(recipe),
        "kernels": backend.kernels(recipe),
    }
    return [
        Phase("import", lambda _nothing: run(import_model(recipe.source), _prologue(recipe.source), target)),
        Phase("simplify", lambda mod: run(mod, simplify(), target)),
        Phase("regions", regions),
        *(Phase(name, _running(passes, target)) for name, passes in arranged.items() if passes),
        Phase("schedules", schedules),
    ]


def walked(backend: Phases, recipe: Recipe, found: Found, dump: Dump, last: str = "schedules") -> tvm.IRModule:
    """The module after a phase."""
    mod = None
    for phase in street(backend, recipe, found):
        progress.now(f"phase {phase.name}")
        mod = dump(phase.name, phase.run(mod))
        if phase.name == last:
            break
    return mod


def _running(passes: Sequence[Pass], target: tvm.target.Target) -> Callable[[tvm.IRModule], tvm.IRModule]:
    return lambda mod: run(mod, passes, target)


@dataclass(frozen=True)
class Compiled:
    """An executable and what is worth knowing about how it came to be."""

    executable: relax.VMExecutable
    module: tvm.IRModule  # what it was made from: scheduled kernels, and the graph that calls them
    target: Target
    kernels: dict[str, int]
    work: Work
    regions: dict[str, dict[str, int]]
    records_digest: str | None
    warnings: list[str]
    records: list[dict[str, Any]]  # which folders of the store served how many kernels
    code: DeviceCode | None  # of the kernels, where they are not the host's
    backend: Phases

    def export(self, path: Path) -> None:
        """Link the bare library, weights inside."""
        self.backend.link(self, path)


@dataclass(frozen=True)
class TunableKernel:
    """One kernel that tuning can search, and how often one inference calls it."""

    name: str
    weight: int
    module: tvm.IRModule


def compile_model(
    backend: Phases, recipe: Recipe, dump_ir: Path | None = None, smaller: Sequence[ModelSource] = ()
) -> Compiled:
    """The whole street; `dump_ir` is a folder for the module after every phase.

    The same model at smaller batches walks it up to scheduled kernels, and joins there.
    """
    dump, found = Dump(dump_ir), Found()
    mod = walked(backend, recipe, found, dump)
    for source in smaller:
        name = entry(source.input_shape[0], recipe.source.input_shape[0])
        mod = joined(mod, walked(backend, replace(recipe, source=source), Found(), dump), name)
    executable = assembled(backend, mod, recipe.target, f"kernels of {recipe.source.name}", dump)
    code = backend.device_code(executable, recipe.target, dump)
    digest, used = (recipe.records.digest, recipe.records.used) if recipe.records else (None, [])
    warnings = found.warnings + (code.warnings if code else [])
    counts, work = count_kernels(mod), replace(found.work, kernels_left=kernels_by_rule(mod))
    return Compiled(executable, mod, recipe.target, counts, work, found.counts, digest, warnings, used, code, backend)


def assembled(backend: Phases, scheduled: tvm.IRModule, target: Target, what: str, dump: Dump) -> relax.VMExecutable:
    """The last phase: scheduled kernels, and the graph that calls them, as an executable."""
    mod = run(scheduled, backend.library(), tvm.target.Target(target.tvm), backend.settings)
    return backend.executable(dump("library", mod), target, what)


def kernels_to_tune(backend: Phases, recipe: Recipe) -> list[TunableKernel]:
    """Every distinct kernel that the model needs on the target and that can be tuned, most used first."""
    mod = walked(backend, recipe, Found(), Dump(), last="kernels")
    found = extracted(mod, tvm.target.Target(recipe.target.tvm))
    return [kernel for kernel in found if backend.tunable(kernel)]


def extracted(mod: tvm.IRModule, target: tvm.target.Target) -> list[TunableKernel]:
    """The kernels of a module that have no schedule yet."""
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    tasks = extract_tasks(mod, target)
    found = [TunableKernel(task.task_name, int(task.weight), task.dispatched[0]) for task in tasks]
    return sorted(found, key=lambda kernel: (-kernel.weight, kernel.name))


def run(
    mod: tvm.IRModule, passes: Iterable[Pass], target: tvm.target.Target, settings: Mapping[str, Any] | None = None
) -> tvm.IRModule:
    """Run passes with the target in scope, as scheduling needs it."""
    with target, tvm.transform.PassContext(opt_level=3, config=dict(settings or {})):
        return tvm.transform.Sequential(list(passes))(mod)


# Passes that all kinds of target have in common -----------------------------


def _prologue(source: ModelSource) -> list[Pass]:
    """What comes before the model as it was imported."""
    return [TakeFrames(source.preprocessing)] if source.takes_frames else []


def simplify() -> list[Pass]:
    return [
        transform.CanonicalizeBindings(),
        RemoveNoOps(),
        FoldConstants(),
        ComputeBeforeConcatenating(),
        FoldBatchNorm(),
        RemoveNoOps(),
        MergeBranches(),
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
        ShortenNames(),
        # Reshapes move nothing. Here, because TVM cannot look at loops that have no block, as generators make them.
        transform.RewriteDataflowReshape(),
        transform.DeadCodeElimination(),
    ]


def memory_plan(capture: bool = False) -> list[Pass]:
    """Calls of kernels on a few storages, which all tensors of an inference share; `capture` as a CUDA graph."""
    return [
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


# What is worth knowing --------------------------------------------------------


def count_kernels(mod: tvm.IRModule) -> dict[str, int]:
    """How many kernels there are, and where each one's schedule came from."""
    origins = Counter(str(func.attrs[SCHEDULE]) for func in mod.functions.values() if SCHEDULE in func.attrs)
    counts = {name: origins.get(name, 0) for name in ("tuned", "scheduled", BY_RULE)}
    return {"total": sum(counts.values()), **counts}


def kernels_by_rule(mod: tvm.IRModule) -> dict[str, int]:
    """The kernels that are not ours, and how often one inference calls each."""
    called = kernels_called(mod["main"]).items()
    return {name: calls for name, calls in called if mod[name].attrs.get(SCHEDULE) == BY_RULE}


def _count_regions(mod: tvm.IRModule, expected: dict[str, int], found: Found) -> None:
    names = calls_of_kernels(mod)
    found.counts |= {name: {"found": names[name], "expected": count} for name, count in expected.items()}
    for name, count in found.counts.items():
        if count["found"] < count["expected"]:
            why = missed(mod["main"], name) or f"nothing in the graph begins like {name}"
            found.warnings.append(f"{count['found']} of {count['expected']} {name} regions were found: {why}.")


def calls_of_kernels(mod: tvm.IRModule) -> Counter[str]:
    """How often `main` calls declared kernels of each kind."""
    calls = relax.analysis.get_var2val(mod["main"]).values()
    found = [read(mod, call) for call in calls if isinstance(call, relax.Call)]
    return Counter(each.spec.op for each in found if each is not None)


class Dump:
    """Writes the module after each phase into a folder, numbered so that they sort in order."""

    def __init__(self, folder: Path | None = None) -> None:
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
