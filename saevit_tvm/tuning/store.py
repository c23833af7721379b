"""The tuning store: every measurement ever made for a target, one folder a target fingerprint.

MetaSchedule's records do not know what they were measured on; ours do. Four kinds of record: a workload (a
kernel, written once), a trial (a candidate of it: trace, time or failure), a model (how often it calls which
kernels), and what `prune` leaves of the trials it removes: enough that none of them is measured again.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import tuning_logs
from saevit_tvm.targets import Target
from saevit_tvm.tuning import convert
from saevit_tvm.tuning.log import Damage, Line, Log, encode

FORMAT = 1
FILE_NAME = "records.jsonl"
ASIDE_NAME = "removed.txt"
MODELLED = "-model"  # ends the fingerprint of a folder whose times were computed, not measured


@dataclass(frozen=True)
class Workload:
    """A kernel: `key` is the text of its spec, or a structural hash without one; `module` the kernel itself, packed."""

    key: str
    name: str
    module: str
    tvm: str


@dataclass(frozen=True)
class Trial:
    """One candidate, measured: `run_secs`, or why there are none."""

    workload: str
    candidate: str
    trace: list[Any]
    run_secs: tuple[float, ...]
    failure: str | None
    words: str | None
    model: str
    task: str
    target: str
    machine: dict[str, Any]
    versions: dict[str, str]
    time: str

    def __post_init__(self) -> None:
        if not all(0 < seconds < math.inf for seconds in self.run_secs):
            raise ValueError("a time must be positive")

    @property
    def valid(self) -> bool:
        return bool(self.run_secs)

    @property
    def seconds(self) -> float:
        """The least disturbed run: other work on the machine only ever adds time."""
        return min(self.run_secs, default=math.inf)

    @property
    def identity(self) -> tuple[str, ...]:
        """The same for the same measurement, however often it was copied."""
        return self.workload, self.candidate, json.dumps(self.machine, sort_keys=True), self.time


@dataclass(frozen=True)
class Model:
    """How often one inference of a model calls each kernel, by its key, and TVM's description of the target."""

    name: str
    input_shape: tuple[int, ...]
    kernels: dict[str, int]
    target: dict[str, Any]
    versions: dict[str, str]
    time: str

    @property
    def label(self) -> str:
        return " ".join([self.name, "x".join(map(str, self.input_shape))]).strip()


@dataclass(frozen=True)
class Pruned:
    """Candidates of a workload whose trials were removed, and how each had failed, if it had."""

    workload: str
    candidates: dict[str, str | None]
    time: str


KINDS: dict[str, type] = {"workload": Workload, "trial": Trial, "model": Model, "pruned": Pruned}
TUPLES = ("run_secs", "input_shape")


def default_root() -> Path:
    chosen = os.environ.get("SAEVIT_TVM_STORE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "saevit-tvm" / "tuning"


def shipped_root() -> Path:
    return Path(tuning_logs.__file__).parent


def fingerprints(root: Path) -> list[str]:
    """The folders below `root` that hold records."""
    return sorted(path.parent.name for path in root.glob(f"*/{FILE_NAME}"))


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Store:
    """The records of one target below `root`. Reading changes nothing on disk; the methods from `repair` on do."""

    def __init__(self, root: Path, target: Target | str) -> None:
        self.fingerprint = target if isinstance(target, str) else target.fingerprint
        self.log = Log(root / self.fingerprint / FILE_NAME)
        self.workloads: dict[str, Workload] = {}
        self.trials: dict[str, list[Trial]] = {}
        self.models: dict[str, Model] = {}
        self.pruned: dict[str, dict[str, str | None]] = {}
        self.unreadable = 0
        self._converted: dict[str, str] = {}  # today's keys of workloads of version 0.1.0
        self.refresh()

    @property
    def path(self) -> Path:
        return self.log.path

    @property
    def modelled(self) -> bool:
        return self.fingerprint.endswith(MODELLED)

    @property
    def tvm(self) -> dict[str, Any] | None:
        """TVM's description of the target; None where no model was ever tuned."""
        return next((model.target for model in self.models.values()), None)

    @property
    def orphans(self) -> int:
        """Trials of a kernel that the store does not have."""
        return sum(len(trials) for key, trials in self.trials.items() if key not in self.workloads)

    @property
    def damage(self) -> Damage:
        return Damage(self.log.damage.torn_bytes, self.log.damage.broken_lines + self.unreadable + self.orphans)

    def refresh(self) -> None:
        """Take in what this and other processes added."""
        taken = [parse(record) for record in self.log.new_records()]
        self.unreadable += taken.count(None)
        for record in sorted(filter(None, taken), key=lambda record: not isinstance(record, Workload)):
            self._take(self._as_today(record))

    def _as_today(self, record: Any) -> Any:
        """A record of version 0.1.0 under the keys of this one; any other as it is. Workloads come first."""
        if isinstance(record, Workload):
            found = convert.kernel(record.module) if record.key.startswith("0x") else None
            if found is None:
                return record
            self._converted[record.key], module = found
            return replace(record, key=self._converted[record.key], module=module)
        if isinstance(record, Model):
            return replace(record, kernels={self._converted.get(key, key): n for key, n in record.kernels.items()})
        key = self._converted.get(record.workload)
        if key is None:
            return record
        if isinstance(record, Pruned):
            return replace(record, workload=key)
        return replace(record, workload=key, candidate=convert.candidate(key, record.trace) or record.candidate)

    def _take(self, record: Any) -> None:
        if isinstance(record, Workload):
            self.workloads.setdefault(record.key, record)
        elif isinstance(record, Trial):
            self.trials.setdefault(record.workload, []).append(record)
        elif isinstance(record, Model):
            self.models[record.label] = record
        else:
            self.pruned.setdefault(record.workload, {}).update(record.candidates)

    def of(self, key: str) -> list[Trial]:
        """All trials of a workload, in the order they were made."""
        return self.trials.get(key, [])

    def fastest(self, key: str) -> list[Trial]:
        """The valid trials of a workload, the fastest first; each candidate once."""
        found: dict[str, Trial] = {}
        for trial in sorted((trial for trial in self.of(key) if trial.valid), key=lambda trial: trial.seconds):
            found.setdefault(trial.candidate, trial)
        return list(found.values())

    def best(self, key: str, count: int) -> list[Trial]:
        """The fastest trials whose trace still applies."""
        return list(islice(self._applicable(key), count))

    def _applicable(self, key: str) -> Iterator[Trial]:
        from saevit_tvm.tuning import replay

        kernel = replay.unpack_workload(self.workloads[key].module) if key in self.workloads else None
        for trial in self.fastest(key) if kernel is not None else []:
            if replay.apply(kernel, trial.trace) is not None:
                yield trial

    def gone(self, key: str) -> dict[str, str | None]:
        """The candidates of a workload that only `prune` remembers."""
        present = {trial.candidate for trial in self.of(key)}
        return {name: failure for name, failure in self.pruned.get(key, {}).items() if name not in present}

    def failures(self, key: str) -> Counter[str]:
        """How many candidates of a workload failed, by the kind of failure."""
        kinds = [trial.failure or "unknown" for trial in self.of(key) if not trial.valid]
        return Counter([*kinds, *filter(None, self.gone(key).values())])

    def predicted(self, model: Model) -> float | None:
        """Seconds an inference spends in its kernels, if each of them has a time."""
        times = [self.fastest(key)[:1] for key in model.kernels]
        if not all(times):
            return None
        return sum(weight * time.seconds for weight, (time,) in zip(model.kernels.values(), times, strict=True))

    # What changes the store ------------------------------------------------

    def shared(self) -> AbstractContextManager[None]:
        """While this is open nobody prunes the store."""
        return self.log.shared()

    def repair(self) -> None:
        """Cut off what a killed writer left unfinished at the end."""
        self.log.repair()

    def add(self, trial: Trial, workload: Workload) -> None:
        """Remember a trial; it is on the disk when this returns."""
        records = [] if trial.workload in self.workloads else [_tagged(workload)]
        self.log.append([*records, _tagged(trial)])
        self.refresh()

    def add_model(self, model: Model) -> None:
        """Remember what a model is made of, unless the store knows just that."""
        if not _same_model(self.models.get(model.label), model):
            self.log.append([_tagged(model)])
            self.refresh()

    def fill(self, model: Model, workloads: Iterable[Workload], trials: Iterable[Trial]) -> None:
        """Remember all of this at once."""
        self.log.append([_tagged(record) for record in (model, *workloads, *trials)])
        self.refresh()

    def merge(self, source: Store, best: int | None = None) -> int:
        """Take over what the source has and this store has not, or of its trials only the best; how many trials.

        What to take is chosen under the lock: whatever else is being written, nothing comes in twice.
        """
        offered = [
            trial for key in source.workloads for trial in (source.of(key) if best is None else source.best(key, best))
        ]
        added: list[Trial] = []

        def missing() -> list[dict[str, Any]]:
            self.refresh()
            present = {trial.identity for trials in self.trials.values() for trial in trials}
            added.extend({trial.identity: trial for trial in offered if trial.identity not in present}.values())
            needed = {trial.workload for trial in added} - self.workloads.keys()
            models = [model for label, model in source.models.items() if not _same_model(self.models.get(label), model)]
            forgotten = [] if best is not None else self._unknown_of(source)
            return [_tagged(r) for r in (*models, *map(source.workloads.get, sorted(needed)), *added, *forgotten)]

        with self.shared():
            self.log.append_chosen(missing)
            self.refresh()
        return len(added)

    def _unknown_of(self, source: Store) -> list[Pruned]:
        """What the source has pruned and this store does not know of."""
        unknown = []
        for key, candidates in source.pruned.items():
            new = {name: failure for name, failure in candidates.items() if name not in self.pruned.get(key, {})}
            unknown += [Pruned(key, new, now())] if new else []
        return unknown

    def prune(self, best: int) -> int:
        """Keep of each kernel the best trials that apply; how many others were removed.

        Of those only the name of the candidate stays, and the kind of its failure: a later run neither measures it
        again nor counts it less. What the cost model could learn from it is lost.
        """
        with self.log.alone():
            self.refresh()
            kept = {trial.identity for key in self.workloads for trial in self.best(key, best)}
            removed = [trial for trials in self.trials.values() for trial in trials if trial.identity not in kept]
            for trial in removed:
                self.pruned.setdefault(trial.workload, {})[trial.candidate] = trial.failure

            def stays(record: dict[str, Any] | None) -> bool:
                parsed = self._as_today(parse(record)) if record and parse(record) else None
                return parsed.identity in kept if isinstance(parsed, Trial) else not isinstance(parsed, Pruned)

            def change(lines: list[Line]) -> Iterator[bytes]:
                yield from (line for line, record in lines if stays(record))
                for key, candidates in self.pruned.items():
                    yield encode(_tagged(Pruned(key, candidates, now())))

            self.log.rewrite(change)
        return len(removed)

    def remove_damage(self) -> int:
        """Put lines that are no use to anybody into a file of their own beside the log; how many."""
        aside: list[bytes] = []

        def change(lines: list[Line]) -> Iterator[bytes]:
            for line, record in lines:
                parsed = None if record is None else parse(record)
                parsed = parsed and self._as_today(parsed)
                orphan = isinstance(parsed, Trial) and parsed.workload not in self.workloads
                if parsed is None or orphan:
                    aside.append(line)
                else:
                    yield line
            with self.path.with_name(ASIDE_NAME).open("ab") as file:
                file.writelines(aside)

        with self.log.alone():
            self.repair()
            self.refresh()
            if self.damage.broken_lines:
                self.log.rewrite(change)
        return len(aside)


def parse(record: Mapping[str, Any]) -> Any | None:
    """A line of the log as what it is; None when it is nothing this version knows."""
    kind = KINDS.get(str(record.get("kind")))
    if kind is None or record.get("format") != FORMAT:
        return None
    values = {name: value for name, value in record.items() if name not in ("kind", "format")}
    try:
        return kind(**{name: _tuple(value) if name in TUPLES else value for name, value in values.items()})
    except (TypeError, ValueError):
        return None


def _tuple(values: Any) -> tuple[Any, ...]:
    if not all(isinstance(value, int | float) for value in values):
        raise TypeError("numbers are expected")
    return tuple(values)


def _tagged(record: Any) -> dict[str, Any]:
    kind = next(name for name, of_kind in KINDS.items() if isinstance(record, of_kind))
    return {"kind": kind, "format": FORMAT, **asdict(record)}


def _same_model(known: Model | None, model: Model) -> bool:
    return known is not None and (known.kernels, known.target) == (model.kernels, model.target)
