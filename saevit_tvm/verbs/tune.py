"""tune: search for fast schedules of a model's kernels, and keep every measurement in the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm import backends, targets
from saevit_tvm.support import cpu, workspace
from saevit_tvm.support.errors import TargetError, UsageError
from saevit_tvm.verbs.build import batches_of, check_dtype, open_at
from schedules.dtypes import TOLERANCE

if TYPE_CHECKING:
    from saevit_tvm.tuning.progress import Show
    from saevit_tvm.tuning.session import Session
    from saevit_tvm.tuning.store import Store

TRIALS_A_KERNEL = 64

Say = Callable[[str], None]


def tune(
    *,
    model: str = "saevit_xs",
    target: str = "native",
    threads: int | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    store: Path | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    image_size: int | tuple[int, int] | None = None,
    batch: int | Sequence[int] = 1,
    dtype: str = "float32",
    measure: str = "local",
    cluster: str | None = None,
    say: Say = lambda _line: None,
    progress: Show | None = None,
) -> dict[str, Any]:
    """Spend the budget (trials ever made for these kernels, or minutes from now); a summary for scripts."""
    start = time.monotonic()
    from saevit_tvm.tuning import measurers

    open_measurer = measurers.parse(measure, cluster)
    chosen = _target(target, threads, dtype)
    if measure == "local" and cluster is None:
        _require_runnable(chosen)
    from saevit_tvm.tuning import progress as display

    session = _session(
        chosen,
        store,
        dtype,
        say,
        {"model": model, "weights": weights, "pretrained": pretrained, "batch": batch, "image_size": image_size},
        modelled=measure == "qemu",
        measurer=lambda: open_measurer(chosen, say),
        show=progress or display.plain(say),
    )
    records = session.store
    if trials is None and minutes is None:
        trials = TRIALS_A_KERNEL * len(session.tasks)
    result = session.run(trials=trials, minutes=minutes)
    made, seconds = result.trials - result.resumed, time.monotonic() - start
    say(f"{made} trials now, {result.trials} in all: {result.ended}")
    return {
        "trials": result.trials,
        "valid": result.valid,
        "failed": result.failed,
        "best_ms": result.best_ms,
        "seconds": seconds,
        "trials_per_second": made / seconds,
        "tasks": result.tasks,
        "tuned": result.tuned,
        "resumed": result.resumed,
        "guided": result.guided,
        "failures": dict(result.failures),
        "ended": result.ended,
        "measured": "modelled" if records.modelled else "time",
        "target": records.fingerprint,
        "dtype": dtype,
        "batches": batches_of(batch),
        "store": str(records.path),
    }


def export_candidates(
    path: Path,
    *,
    model: str = "saevit_xs",
    target: str = "native",
    threads: int | None = None,
    trials: int | None = None,
    store: Path | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    image_size: int | tuple[int, int] | None = None,
    batch: int | Sequence[int] = 1,
    dtype: str = "float32",
    with_runtime: bool = False,
    say: Say = lambda _line: None,
) -> dict[str, Any]:
    """Put as many candidates as `trials` into one file, with the program that measures them elsewhere."""
    start = time.monotonic()
    from saevit_tvm.tuning import bundle

    bundle.check_name(path)
    if not isinstance(batch, int):
        raise UsageError(
            "candidates are exported for one batch at a time: give --batch one number, and export for each."
        )
    chosen = _target(target, threads, dtype)
    runtime = bundle.runtime_libraries(chosen, with_runtime)
    what = {"model": model, "weights": weights, "pretrained": pretrained, "batch": batch, "image_size": image_size}
    session = _session(chosen, store, dtype, say, what)
    with workspace.staging(path.parent) as staged, workspace.scratch() as scratch:
        made = bundle.export(
            session,
            chosen,
            trials or TRIALS_A_KERNEL * len(session.tasks),
            staged / path.name,
            scratch,
            folder=path.name.partition(".")[0],
            tolerance=TOLERANCE[dtype],
            runtime=runtime,
            say=say,
        )
        workspace.place([(staged / path.name, path)])
    return {
        "exported": str(path),
        "candidates": made.candidates,
        "kernels": made.kernels,
        "failed": made.failed,
        "bytes": made.bytes,
        "target": session.store.fingerprint,
        "dtype": dtype,
        "seconds": time.monotonic() - start,
    }


def import_results(path: Path, *, target: str | None = None, store: Path | None = None) -> dict[str, Any]:
    """Bring what `run.py` measured into the store; what is there already is not taken twice."""
    start = time.monotonic()
    from saevit_tvm.tuning import bundle
    from saevit_tvm.tuning.store import default_root

    recovered = bundle.read_results(path)
    if target is not None and targets.get(target).fingerprint != recovered.fingerprint:
        raise UsageError(
            f"'{path}' was measured for {recovered.fingerprint}, not for target '{target}': leave out --target."
        )
    with workspace.scratch() as scratch:
        records, counts = bundle.take(recovered, store or default_root(), scratch)
    return {
        "imported": str(path),
        "new": counts["new"],
        "known": counts["known"],
        "valid": counts["valid"],
        "failed": counts["failed"],
        "damaged": recovered.damaged,
        "machines": recovered.machines,
        "target": records.fingerprint,
        "store": str(records.path),
        "seconds": time.monotonic() - start,
    }


def _target(name: str, threads: int | None, dtype: str) -> targets.Target:
    """A target that candidates can be built for in this type."""
    check_dtype(dtype)
    chosen = targets.get(name, threads).computing_in(dtype)
    backends.require(chosen)
    return chosen


def _session(
    chosen: targets.Target,
    store: Path | None,
    dtype: str,
    say: Say,
    what: Mapping[str, Any],
    *,
    modelled: bool = False,
    **ways: Any,
) -> Session:
    """The search over the kernels of a model, with all that the store knows of them."""
    from saevit_tvm.models.opening import open_model
    from saevit_tvm.tuning.records import open_records
    from saevit_tvm.tuning.session import Session
    from saevit_tvm.tuning.space import Features, space_for
    from saevit_tvm.tuning.store import MODELLED, Store, default_root

    # What an emulator computes must never be taken for a time: it has a folder of its own.
    records = Store(store or default_root(), chosen.fingerprint + (MODELLED if modelled else ""))
    records.repair()
    _report_damage(records, say)
    sources = open_at(batches_of(what["batch"]), lambda batch: open_model(**{**what, "batch": batch}))
    *others, kernels = [backends.kernels_to_tune(source, chosen, dtype) for source in sources]
    *smaller, source = sources
    name = source.name if dtype == "float32" else f"{source.name} in {dtype}"
    count = sum(map(len, [*others, kernels]))
    say(f"tuning {count} kernels of {name} for {chosen.name}, records in {records.path.parent}")
    return Session(
        kernels,
        chosen,
        records,
        model=str(source.recipe["model"]),
        input_shape=source.input_shape,
        other_shapes={each.input_shape: found for each, found in zip(smaller, others, strict=True)},
        seeds=open_records(store, chosen),
        space_for=lambda kernel: space_for(kernel, chosen),
        features=Features(),
        **ways,
    )


def _require_runnable(target: targets.Target) -> None:
    works, reason = backends.runs_here(target)
    if not works:
        raise TargetError(
            f"target '{target.name}' cannot be tuned on this machine: it {reason}. "
            "Tune on a machine that has it and copy the store, reach one with --measure rpc://HOST:PORT/KEY, or take "
            "candidates there with --export-candidates."
        )
    backends.get(target.kind).require_tunable(target)
    threads, cores = target.threads or 1, cpu.cores()
    if threads > cores:
        raise UsageError(
            f"kernels cut for {threads} threads cannot be timed on {_cores(cores)}: tune for fewer threads, or on a "
            "machine that has as many."
        )


def _cores(count: int) -> str:
    return "one core" if count == 1 else f"{count} cores"


def _report_damage(records: Store, say: Say) -> None:
    damage = records.damage
    if damage.torn_bytes:
        say(f"cut off {damage.torn_bytes} bytes of an unfinished record at the end of {records.path}")
    if damage.broken_lines:
        say(f"skipped {damage.broken_lines} records of {records.path} that cannot be read")
