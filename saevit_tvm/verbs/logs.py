"""logs: look at the tuning store, check and repair it, put stores together, and make one small."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saevit_tvm.support.errors import TuningError, UsageError, unknown
from saevit_tvm.tuning.store import ASIDE_NAME, Model, Store, Trial, default_root, fingerprints, shipped_root

Say = Callable[[str], None]


def listing(root: Path | None) -> dict[str, Any]:
    """Every folder of records: the user's own, and those that ship with the package."""
    own = root or default_root()
    return {"store": str(own), "fingerprints": [_folder(store, shipped) for store, shipped in _stores(own)]}


def show(root: Path | None, fingerprint: str | None, model: str | None) -> dict[str, Any]:
    """The kernels of one folder, those with the most time first: best time, trials, failures, who measured."""
    store, shipped = _find(root or default_root(), fingerprint)
    models = [found for found in store.models.values() if model in (None, found.name, found.label)]
    kernels = [_kernel(store, key, models) for key in store.workloads if model is None or _part_of(store, key, model)]
    if model is not None and not kernels:
        raise unknown("model", model, _model_names(store))
    kernels.sort(key=lambda kernel: -(kernel["best_ms"] or 0) * (kernel["calls"] or 1))
    rows = [_model(store, found) | {"curve": _curve(store, found)} for found in models]
    return _folder(store, shipped) | {"models": rows, "kernels": kernels}


def check(root: Path | None, fingerprint: str | None, *, repair: bool, say: Say) -> dict[str, Any]:
    """Read every record and replay every trace; with `repair`, also put aside what is damaged."""
    own = root or default_root()
    rows = []
    for name in _names(own, fingerprint):
        say(f"checking {name}")
        rows.append(_checked(Store(own, name), repair))
    return {"store": str(own), "damaged": any(row["damaged"] for row in rows), "fingerprints": rows}


def merge(sources: list[Path], into: Path, best: int | None) -> dict[str, Any]:
    """Take over what other stores have; of their trials only the `best` of each kernel if that is given."""
    for source in sources:
        if not fingerprints(source):
            raise _empty(source)
        if into.exists() and source.samefile(into):
            raise UsageError(f"'{source}' cannot be merged into itself: give another folder with --into.")
    added: Counter[str] = Counter()
    for source in sources:
        for name in fingerprints(source):
            added[name] += Store(into, name).merge(Store(source, name), best)
    rows = [_folder(Store(into, name), shipped=False) | {"added": count} for name, count in added.items()]
    return {"into": str(into), "fingerprints": rows}


def prune(root: Path | None, fingerprint: str | None, best: int) -> dict[str, Any]:
    """Keep the `best` trials of each kernel that still apply; of the others only that they were made."""
    own = root or default_root()
    rows = []
    for name in _names(own, fingerprint):
        store = Store(own, name)
        before = store.path.stat().st_size
        removed = store.prune(best)
        rows.append(_folder(Store(own, name), shipped=False) | {"removed": removed, "bytes_before": before})
    return {"store": str(own), "fingerprints": rows}


# Finding a folder -------------------------------------------------------


def _stores(own: Path) -> list[tuple[Store, bool]]:
    places = {shipped_root().resolve(): True} | {own.resolve(): False}
    return [(Store(place, name), shipped) for place, shipped in places.items() for name in fingerprints(place)]


def _find(own: Path, fingerprint: str | None) -> tuple[Store, bool]:
    """The folder that is meant, the user's own before a shipped one; without a name, the only one there is."""
    stores = {store.fingerprint: (store, shipped) for store, shipped in _stores(own)}
    if not stores:
        raise _empty(own)
    if fingerprint is None and len(stores) > 1:
        raise UsageError(f"there are records of several targets: say which, one of {', '.join(stores)}.")
    if fingerprint is not None and fingerprint not in stores:
        raise unknown("fingerprint", fingerprint, stores)
    return stores[fingerprint or next(iter(stores))]


def _names(own: Path, fingerprint: str | None) -> list[str]:
    names = fingerprints(own)
    if not names:
        raise _empty(own)
    if fingerprint is not None and fingerprint not in names:
        raise unknown("fingerprint", fingerprint, names)
    return names if fingerprint is None else [fingerprint]


def _empty(root: Path) -> TuningError:
    return TuningError(
        f"there are no tuning records in '{root}': give the folder of a store, or make one with 'saevit-tvm tune'."
    )


# What is said of it -----------------------------------------------------


def _folder(store: Store, shipped: bool) -> dict[str, Any]:
    trials = [trial for trials in store.trials.values() for trial in trials]
    gone = sum(len(store.gone(key)) for key in store.pruned)
    failures = sum((store.failures(key) for key in {*store.trials, *store.pruned}), Counter[str]())
    return {
        "fingerprint": store.fingerprint,
        "origin": "shipped" if shipped else "own",
        "modelled": store.modelled,
        "trials": len(trials) + gone,
        "valid": len(trials) + gone - failures.total(),
        "failed": failures.total(),
        "failures": dict(failures.most_common()),
        "pruned": gone,
        "kernels": len(store.workloads),
        "models": [_model(store, model) for model in store.models.values()],
        "machines": _machines(trials),
        "bytes": store.path.stat().st_size,
        "last": max((trial.time for trial in trials), default=None),
        "path": str(store.path),
    }


def _model(store: Store, model: Model) -> dict[str, Any]:
    predicted = store.predicted(model)
    return {
        "name": model.name,
        "input": list(model.input_shape),
        "kernels": len(model.kernels),
        "tuned": sum(bool(store.fastest(key)) for key in model.kernels),
        "best_ms": None if predicted is None else 1e3 * predicted,
    }


def _curve(store: Store, model: Model) -> list[dict[str, Any]]:
    """How the prediction came down: a point for each trial that improved it."""
    trials = [trial for key in model.kernels for trial in store.of(key)]
    best = dict.fromkeys(model.kernels, math.inf)
    points: list[dict[str, Any]] = []
    for count, trial in enumerate(sorted(trials, key=lambda trial: trial.time), 1):
        if trial.seconds < best[trial.workload]:
            best[trial.workload] = trial.seconds
            predicted = 1e3 * sum(weight * best[key] for key, weight in model.kernels.items())
            points += [{"trials": count, "time": trial.time, "best_ms": predicted}] if predicted < math.inf else []
    return points


def _machines(trials: list[Trial]) -> list[dict[str, Any]]:
    """Who measured, and how much."""
    machines = {json.dumps(trial.machine, sort_keys=True): trial.machine for trial in trials}
    counts = Counter(json.dumps(trial.machine, sort_keys=True) for trial in trials)
    return [machines[name] | {"trials": count} for name, count in counts.most_common()]


def _kernel(store: Store, key: str, models: list[Model]) -> dict[str, Any]:
    trials, fastest, gone = store.of(key), store.fastest(key), store.gone(key)
    best, failures = (fastest[0] if fastest else None), store.failures(key)
    words = next((trial.words for trial in reversed(trials) if trial.words), None)
    return {
        "key": key,
        "name": store.workloads[key].name,
        "models": sorted({trial.model for trial in trials} | {m.name for m in models if key in m.kernels}),
        "calls": next((model.kernels[key] for model in models if key in model.kernels), None),
        "best_ms": 1e3 * best.seconds if best else None,
        "trials": len(trials) + len(gone),
        "valid": len(trials) + len(gone) - failures.total(),
        "failures": dict(failures.most_common()),
        "last_words": words,
        "best": best and {"trace": best.trace, "machine": best.machine, "versions": best.versions, "time": best.time},
    }


def _part_of(store: Store, key: str, model: str) -> bool:
    known = any(key in found.kernels for found in store.models.values() if model in (found.name, found.label))
    return known or any(trial.model == model for trial in store.of(key))


def _model_names(store: Store) -> list[str]:
    trials = {trial.model for trials in store.trials.values() for trial in trials}
    return sorted(trials | {model.name for model in store.models.values()})


def _checked(store: Store, repair: bool) -> dict[str, Any]:
    from saevit_tvm.tuning import replay

    valid = {key: store.fastest(key) for key in store.workloads}
    kernels = {key: replay.unpack_workload(store.workloads[key].module) for key in valid}
    unread = [key for key, kernel in kernels.items() if kernel is None]
    refused = [
        trial.candidate
        for key, kernel in kernels.items()
        for trial in (valid[key] if kernel is not None else [])
        if replay.apply(kernel, trial.trace) is None
    ]
    faults = {
        "torn_bytes": store.log.torn(),
        "broken_lines": store.log.damage.broken_lines,
        "unreadable": store.unreadable,
        "orphans": store.orphans,
    }
    return {
        "fingerprint": store.fingerprint,
        "path": str(store.path),
        "trials": sum(map(len, store.trials.values())),
        "kernels": len(store.workloads),
        **faults,
        "outdated_kernels": len(unread),
        "outdated_trials": len(refused) + sum(len(valid[key]) for key in unread),
        "damaged": any(faults.values()),
        "set_aside": store.remove_damage() if repair and any(faults.values()) else None,
        "aside": str(store.path.with_name(ASIDE_NAME)),
    }
