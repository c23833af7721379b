"""The tuning store: every measurement ever made for a target, and the best of them for the compiler.

One folder a target fingerprint, because MetaSchedule's records do not know what they were measured on.
Two kinds of record: a workload (a kernel, written once) and a trial (a candidate of it: trace, time or failure).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tuning_logs
from saevit_tvm.targets import Target
from saevit_tvm.tuning.log import Damage, Log

FORMAT = 1
FILE_NAME = "records.jsonl"


@dataclass(frozen=True)
class Workload:
    """A kernel: `key` is its structural hash, `module` the kernel itself, packed."""

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

    @property
    def valid(self) -> bool:
        return bool(self.run_secs)

    @property
    def seconds(self) -> float:
        """The least disturbed run: other work on the machine only ever adds time."""
        return min(self.run_secs, default=math.inf)


@dataclass(frozen=True)
class Best:
    """The trial to use for a workload, and MetaSchedule's record of it, already replayed."""

    trial: Trial
    record: Any


def default_root() -> Path:
    chosen = os.environ.get("SAEVIT_TVM_STORE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "saevit-tvm" / "tuning"


def shipped_root() -> Path:
    return Path(tuning_logs.__file__).parent


class Store:
    """The records of one target below `root`. Reading changes nothing on disk; `repair` and `add` do."""

    def __init__(self, root: Path, target: Target) -> None:
        self.log = Log(root / target.fingerprint / FILE_NAME)
        self.workloads: dict[str, Workload] = {}
        self.trials: dict[str, list[Trial]] = {}
        self.unreadable = 0
        self.refresh()

    @property
    def path(self) -> Path:
        return self.log.path

    @property
    def damage(self) -> Damage:
        orphans = sum(len(trials) for key, trials in self.trials.items() if key not in self.workloads)
        return Damage(self.log.damage.torn_bytes, self.log.damage.broken_lines + self.unreadable + orphans)

    def repair(self) -> None:
        """Cut off what a killed writer left unfinished at the end."""
        self.log.repair()

    def add(self, trial: Trial, workload: Workload) -> None:
        """Remember a trial; it is on the disk when this returns."""
        records = [] if trial.workload in self.workloads else [_tagged("workload", workload)]
        self.log.append([*records, _tagged("trial", trial)])
        self.refresh()

    def refresh(self) -> None:
        """Take in what this and other processes added."""
        for record in self.log.new_records():
            if not self._take(record):
                self.unreadable += 1

    def _take(self, record: dict[str, Any]) -> bool:
        if record.get("format") != FORMAT:
            return False
        fields = {key: value for key, value in record.items() if key not in ("kind", "format")}
        try:
            if record["kind"] == "workload":
                workload = Workload(**fields)
                self.workloads.setdefault(workload.key, workload)
            else:
                trial = Trial(**{**fields, "run_secs": _times(fields["run_secs"])})
                self.trials.setdefault(trial.workload, []).append(trial)
        except (KeyError, TypeError, ValueError):
            return False
        return True

    def of(self, key: str) -> list[Trial]:
        """All trials of a workload, in the order they were made."""
        return self.trials.get(key, [])

    def best_applicable(self) -> dict[str, Best]:
        """For each workload the fastest trial whose trace still applies."""
        best = {key: _fastest_applicable(kernel, self.of(key)) for key, kernel in self.workloads.items()}
        return {key: choice for key, choice in best.items() if choice is not None}

    def database(self) -> Any:
        """A MetaSchedule database of the best records."""
        return _database(self.best_applicable().values())

    def digest(self) -> str:
        return _digest(self.best_applicable().values())


def open_records(root: Path | None, target: Target) -> tuple[Any, str] | None:
    """What the compiler looks kernels up in: the user's records, then the shipped ones, with their digest.

    A kernel the user has tuned is taken from the user's store: tuning starts from the shipped record, so what
    the store says is never slower on the user's machine.
    """
    best = Store(shipped_root(), target).best_applicable()
    best |= Store(root or default_root(), target).best_applicable()
    return (_database(best.values()), _digest(best.values())) if best else None


def _tagged(kind: str, record: Workload | Trial) -> dict[str, Any]:
    return {"kind": kind, "format": FORMAT, **asdict(record)}


def _times(values: Any) -> tuple[float, ...]:
    times = tuple(float(value) for value in values)
    if not all(0 < value < math.inf for value in times):
        raise ValueError("a time must be positive")
    return times


def _fastest_applicable(workload: Workload, trials: list[Trial]) -> Best | None:
    from saevit_tvm.tuning import replay

    valid = sorted((trial for trial in trials if trial.valid), key=lambda trial: trial.seconds)
    kernel = replay.unpack_workload(workload.module) if valid else None
    for trial in valid if kernel is not None else []:
        schedule = replay.apply(kernel, trial.trace)
        if schedule is not None:
            return Best(trial, replay.as_record(kernel, schedule, trial.seconds))
    return None


def _database(best: Iterable[Best]) -> Any:
    # Equality must be "structural": under "ignore-tensor" MetaScheduleApplyDatabase would put the record's kernel
    # into the model, with the record's constants in place of the model's own.
    from tvm.s_tir.meta_schedule.database import MemoryDatabase

    database = MemoryDatabase(module_equality="structural")
    for choice in best:
        database.commit_workload(choice.record.workload.mod)
        database.commit_tuning_record(choice.record)
    return database


def _digest(best: Iterable[Best]) -> str:
    lines = sorted(json.dumps([choice.trial.workload, choice.trial.trace]) for choice in best)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
