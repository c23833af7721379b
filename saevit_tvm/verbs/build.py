"""build: model + target -> one verified artifact in place, or nothing at all.

Compile, link, seal, load that very file, compare it with PyTorch, and only then move it to its name.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm import backends, targets
from saevit_tvm.runtime.tensors import shown
from saevit_tvm.support import workspace
from saevit_tvm.support.errors import ParityError, TargetError, UsageError, unknown
from saevit_tvm.verbs import made_before
from schedules.dtypes import DTYPES, MOST_MOVES, TOLERANCE

if TYPE_CHECKING:
    from saevit_tvm.compiler.street import Compiled
    from saevit_tvm.models.opening import ModelSource
    from saevit_tvm.proof import parity
    from saevit_tvm.targets import Target

Say = Callable[[str], None]
SOMEWHAT_MORE = 1.5
HERE = "host"  # the proof of what this CPU itself has run


@dataclass(frozen=True)
class BuildOptions:
    """What the user asked for; None means that the model or its checkpoint decides."""

    model: str = "saevit_xs"
    target: str = "native"
    threads: int | None = None
    weights: str | None = None
    labels: Path | None = None
    batch: int | Sequence[int] = 1  # several: one library with a function for each
    image_size: int | tuple[int, int] | None = None
    dtype: str = "float32"
    input_dtype: str = "float32"
    num_classes: int | None = None
    features_only: bool = False
    seed: int = 0
    pretrained: bool = False
    use_tuned: bool = True
    store: Path | None = None
    out: Path = Path("out")
    name: str | None = None
    dump_ir: Path | None = None
    reuse: bool = False  # take what was built before from the cache, if nothing has changed that it depends on


@dataclass(frozen=True)
class BuildResult:
    artifact: Path
    manifest_path: Path
    manifest: dict[str, Any]
    warnings: list[str]
    seconds: float
    reused: bool
    left: dict[str, Any]  # to TVM's rules: the share of the multiply-adds, and, where it runs on this CPU, of the time


def build(options: BuildOptions, say: Say) -> BuildResult:
    """Build, prove and place one artifact."""
    start = time.monotonic()
    check_dtype(options.dtype)
    if options.dump_ir is not None and options.dump_ir.exists() and not options.dump_ir.is_dir():
        raise UsageError(f"'{options.dump_ir}' is not a directory: give --dump-ir a folder.")
    if options.name is not None:
        _check_name(options.name)
    with workspace.staging(options.out) as staged, workspace.scratch() as scratch:
        target = _target(options.target, options.threads).computing_in(options.dtype)
        stem = options.name.removesuffix(".so") if options.name else _default_stem(options, target)
        suffix = ".so" if target.output == "library" else ".tar"
        artifact, manifest_path = options.out / f"{stem}{suffix}", options.out / f"{stem}.json"
        workspace.free(artifact, manifest_path)
        key = made_before.key(vars(options), target) if options.reuse and options.dump_ir is None else None
        found = made_before.find(key, staged / artifact.name) if key else None
        made = found or _made(options, target, staged / artifact.name, scratch, say)
        if key and not found and _is_proven(made["manifest"], target):
            made_before.keep(key, staged / artifact.name, made)
        workspace.place([(staged / artifact.name, artifact), (staged / manifest_path.name, manifest_path)])
    return BuildResult(
        artifact, manifest_path, made["manifest"], made["warnings"], time.monotonic() - start, bool(found), made["left"]
    )


def _is_proven(manifest: dict[str, Any], target: Target) -> bool:
    """As far as it can be here: what was in the way of a proof may be gone at the next build."""
    proof = manifest["verification"]
    if proof["passed"] or "arithmetic" in proof:
        return True
    from saevit_tvm.proof.stand_in import can_stand_in, takes_minutes

    return backends.how_to_run(target) is None and (not can_stand_in(target) or takes_minutes(manifest))


def _made(options: BuildOptions, target: Target, artifact: Path, scratch: Path, say: Say) -> dict[str, Any]:
    """An artifact and its manifest, proven, in `artifact` and beside it; what is told of it."""
    from saevit_tvm.models.recreate import one_thread

    with one_thread():
        *smaller, source = _open(options)
        workspace.reserve(artifact.parent, _estimate(source))
        say(f"compiling {source.name} {_at([*smaller, source])}, for {target.name} ({target.summary})")
        compiled = _compile(source, smaller, target, options)
        say("linking")
        library = scratch / "library.so"
        compiled.export(library)
        manifest = _prove(source, smaller, compiled, target, options.dtype, library, artifact, say)
    left = _left_to_rules(manifest, source, artifact, scratch)
    return {"manifest": manifest, "warnings": compiled.warnings, "left": left}


def _left_to_rules(manifest: dict[str, Any], source: ModelSource, artifact: Path, scratch: Path) -> dict[str, Any]:
    """What no kernel of ours computes. Times are of this moment, so they are no part of the artifact."""
    from saevit_tvm.proof import parity
    from saevit_tvm.proof.times import kernel_times

    work = manifest["work"]
    left: dict[str, Any] = {"multiply_adds": work["left_to_rules"] / max(work["multiply_adds"], 1), "time": None}
    left["kernels"] = {name: {"calls": calls} for name, calls in work["kernels_left"].items()}
    if not left["kernels"]:
        left["time"] = 0.0
    elif manifest["verification"]["proof"] == HERE:
        (inputs,) = parity.random_inputs(source.library_inputs, 1)
        times = kernel_times(artifact, inputs, scratch)
        total = sum(times.values()) or 1.0  # a model may be no kernel at all
        for name, kernel in left["kernels"].items():
            kernel["time"] = times.get(name, 0.0) / total
        left["time"] = sum(kernel["time"] for kernel in left["kernels"].values())
    return left


def _at(sources: Sequence[ModelSource]) -> str:
    """The shapes in words."""
    if size := sources[-1].recipe["image_size"]:
        return f"at {size[0]}x{size[1]}, batch {', '.join(str(each.recipe['batch']) for each in sources)}"
    return "on " + " or ".join(" and ".join(shown(spec.shape) for spec in each.inputs) for each in sources)


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,199}", name.removesuffix(".so")):
        raise UsageError(
            f"'{name}' cannot be the name of an artifact: use up to 200 letters, digits and any of "
            "_ . + -, and give the folder with --out."
        )


def _default_stem(options: BuildOptions, target: Target) -> str:
    """A name that tells the artifacts of one model apart."""
    path = Path(options.model)
    parts = [path.stem if path.suffix in (".pt2", ".onnx") else options.model, target.name]
    parts += [options.dtype] if options.dtype != "float32" else []
    parts += [f"{options.input_dtype}-input"] if options.input_dtype != "float32" else []
    parts += [f"{options.threads}t"] if options.threads is not None else []
    batches = batches_of(options.batch)
    parts += [f"b{'-'.join(map(str, batches))}"] if batches != [1] else []
    size = options.image_size
    parts += [] if size is None else [f"{size}px" if isinstance(size, int) else f"{size[0]}x{size[1]}px"]
    parts += ["features"] if options.features_only else []
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", "-".join(parts))


def _target(name: str, threads: int | None) -> Target:
    """The target, if what it needs to be built for is there."""
    target = targets.get(name, threads)
    backends.require(target)
    return target


def _open(options: BuildOptions) -> list[ModelSource]:
    """The model at each batch, the largest last."""
    from saevit_tvm.models.opening import open_model, with_labels

    def opened(batch: int) -> ModelSource:
        return open_model(
            options.model,
            weights=options.weights,
            batch=batch,
            image_size=options.image_size,
            num_classes=options.num_classes,
            features_only=options.features_only,
            seed=options.seed,
            pretrained=options.pretrained,
            input_dtype=options.input_dtype,
        )

    sources = open_at(batches_of(options.batch), opened)
    if options.labels is not None:
        sources[-1] = with_labels(sources[-1], options.labels)
    return sources


def batches_of(given: int | Sequence[int]) -> list[int]:
    """Numbers of pictures, smallest first."""
    return [given] if isinstance(given, int) else sorted(set(given))


def open_at(batches: Sequence[int], opened: Callable[[int], ModelSource]) -> list[ModelSource]:
    """A model at each batch, if it can have several."""
    sources = [opened(batch) for batch in batches]
    if len(sources) > 1:
        _check_batches(sources, batches)
    return sources


def _check_batches(sources: Sequence[ModelSource], batches: Sequence[int]) -> None:
    """Pictures must come and go one row each."""
    for source, batch in zip(sources, batches, strict=True):
        for rows in (spec.shape[0] for spec in source.inputs):
            if rows != batch:
                raise UsageError(f"'{source.name}' takes batches of {rows} only: leave out the batch.")
    largest = sources[-1]
    for name, output in zip(largest.output_names, largest.original(*largest.zeros()), strict=True):
        if output.shape[:1] != largest.input_shape[:1]:
            raise UsageError(f"'{largest.name}' has no row a picture in its {name}: give one batch, not several.")


def _compile(source: ModelSource, smaller: Sequence[ModelSource], target: Target, options: BuildOptions) -> Compiled:
    from saevit_tvm.tuning.records import open_records

    records = open_records(options.store, target) if options.use_tuned else None
    return backends.compile_model(
        source, target, records=records, dump_ir=options.dump_ir, dtype=options.dtype, smaller=smaller
    )


def _estimate(source: ModelSource) -> int:
    """Bytes that the artifact will need at least: its weights, and some code."""
    return source.weight_bytes + 1_000_000


# The proof ----------------------------------------------------------


def _prove(
    source: ModelSource,
    smaller: Sequence[ModelSource],
    compiled: Compiled,
    target: Target,
    dtype: str,
    library: Path,
    sealed: Path,
    say: Say,
) -> dict[str, Any]:
    """Compare the library with PyTorch, seal it with the result, see that the sealed file answers alike."""
    from saevit_tvm.models.recreate import oracle
    from saevit_tvm.proof import answers as proof
    from saevit_tvm.proof import parity
    from saevit_tvm.proof.stand_in import can_stand_in
    from saevit_tvm.runtime.artifact import read_manifest, seal, seal_objects

    inputs = parity.random_inputs(source.library_inputs)
    expected = [source.reference(*each) for each in inputs]
    batches = [each.input_shape[0] for each in smaller]
    inputs, expected = parity.with_smaller(inputs, expected, batches)
    manifest = _manifest(source, compiled, target, dtype, inputs, expected)
    if smaller:
        manifest["batches"] = [*batches, source.input_shape[0]]
    how, why = _where_to_run(target, say)
    if how is None:
        if can_stand_in(target):
            manifest["verification"] |= _stood_in(manifest, compiled, inputs, expected, library, source, say)
        if not manifest["verification"]["passed"]:
            say(f"not verified: {target.name} {why}")
        (seal_objects if target.output == "objects" else seal)(library, manifest, sealed)
        return json.loads(sealed.with_suffix(".json").read_bytes())

    where = proof.machine(manifest["target"], how)
    say(f"verifying against {oracle(source)} on {len(inputs)} random inputs, {where}")
    trial = library.with_name("trial.so")
    seal(library, manifest, trial)
    answers = proof.answers(trial, inputs, library.parent, how)
    deviation = parity.deviation(answers, expected)
    if not _holds(deviation, manifest, source, inputs):
        raise _parity_miss("the library deviates", manifest, deviation, oracle(source), source.remedy)
    manifest["verification"] |= {
        "passed": True,
        **deviation.entries,
        "proof": how if how == "qemu" else target.proof,
        "machine": where,
        "reference": oracle(source),
    }
    seal(library, manifest, sealed)
    again = proof.answers(sealed, inputs, library.parent, how)
    if not parity.deviation(again, answers).is_none:
        raise ParityError("the library does not answer twice alike, so nothing was built: please report the model.")
    return read_manifest(sealed)


def _stood_in(
    manifest: dict[str, Any],
    compiled: Compiled,
    inputs: list[Any],
    expected: list[Any],
    library: Path,
    source: ModelSource,
    say: Say,
) -> dict[str, Any]:
    """What can be shown of a GPU's program without the GPU: its kernels, run by this CPU."""
    from saevit_tvm.models.recreate import oracle
    from saevit_tvm.proof import answers as proof
    from saevit_tvm.proof import parity, stand_in

    asked, expected = map(stand_in.some, (inputs, expected))
    try:
        here = stand_in.made(manifest, compiled, library.parent, library)
    except TargetError as error:
        say(f"its kernels are not run by this CPU: {error}")
        return {}
    say(f"computing {len(asked)} random inputs with its kernels on this CPU, by {here.entries['by']}")
    answers = proof.answers(here.artifact, asked, library.parent, environment=here.environment)
    deviation = parity.deviation(answers, expected)
    if not _holds(deviation, manifest, source, inputs):
        raise _parity_miss("the kernels, run on this CPU, deviate", manifest, deviation, oracle(source))
    entries = deviation.entries | {"inputs": len(asked), **here.entries}
    if here.proof is None:
        return {"arithmetic": entries}
    del entries["by"]
    return {"passed": True, **entries, "proof": here.proof, "machine": here.machine, "reference": oracle(source)}


def _holds(deviation: parity.Deviation, manifest: dict[str, Any], source: ModelSource, inputs: list[Any]) -> bool:
    """Whether a deviation is allowed; where it is not at once, PyTorch's own in the same type may say that it is.

    Models differ in how much they make of roundings. A library's are not PyTorch's, so it may be off by somewhat more.
    """
    from saevit_tvm.proof import parity

    proof = manifest["verification"]
    if not deviation.within(parity.allowed(manifest)):
        own = max(source.rounds(manifest["dtype"], source.prepared(*each)) for each in inputs[: parity.INPUTS])
        if own:
            proof["original_moves"] = min(SOMEWHAT_MORE * own, MOST_MOVES)
            proof["tolerance"] = parity.allowed(manifest)
    return deviation.within(parity.allowed(manifest))


def _parity_miss(
    what: str, manifest: Mapping[str, Any], deviation: parity.Deviation, reference: str, remedy: str | None = None
) -> ParityError:
    return ParityError(
        f"{what} from {reference} by {deviation}, where {manifest['verification']['tolerance']:.2g} is allowed, so "
        f"nothing was built: "
        f"{remedy or 'please report the model'}."
    )


def _where_to_run(target: Target, say: Say) -> tuple[str | None, str]:
    """How to run what was built; why not, where it cannot be."""
    how = backends.how_to_run(target)
    if how != "qemu":
        return how, backends.why_not(target)
    from saevit_tvm.emulators import qemu

    try:
        qemu.foreign_runtime(target.arch, say)
    except TargetError as error:
        return None, f"cannot be emulated: {str(error).rstrip('.')}"
    return how, ""


def _manifest(
    source: ModelSource,
    compiled: Compiled,
    target: Target,
    dtype: str,
    inputs: list[Any],
    expected: list[list[Any]],
) -> dict[str, Any]:
    """Everything but the proof. No time, no date, no path: the same inputs give the same bytes.

    `dtype` is what is computed in. What a program gives and gets does not depend on it.
    """
    from saevit_tvm.proof import parity
    from saevit_tvm.runtime.artifact import installed_versions

    outputs = zip(source.output_names, expected[0], strict=True)
    moves = max(source.moves(source.prepared(*each), TOLERANCE[dtype]) for each in inputs[: parity.INPUTS])
    code = {"device_code": compiled.code.report} if compiled.code else {}
    proof = {
        "passed": False,
        "max_abs_error": None,
        "max_rel_error": None,
        "proof": "none",
        "inputs": len(inputs),
        "seed": parity.SEED,
        **({"original_moves": moves} if moves else {}),
    }
    return (
        code
        | backends.get(target.kind).launches(compiled)
        | {
            "model": source.recipe["model"],
            "recipe": source.recipe | {"dtype": dtype},
            "weights": source.weights,
            "weights_digest": source.weights_digest,
            "inputs": [spec.entry for spec in source.library_inputs],
            "outputs": [{"name": n, "shape": list(value.shape), "dtype": str(value.dtype)} for n, value in outputs],
            "preprocessing": source.preprocessing,
            "labels": list(source.labels) if source.labels else None,
            "target": target.entry,
            "dtype": dtype,
            "versions": installed_versions(),
            "records_digest": compiled.records_digest,
            "records": compiled.records,
            "regions": compiled.regions,
            "kernels": compiled.kernels,
            "work": dataclasses.asdict(compiled.work),
            "verification": proof | {"tolerance": parity.allowed({"dtype": dtype, "verification": proof})},
            "reference": parity.record(expected),
        }
    )
