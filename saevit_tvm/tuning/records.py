"""What the compiler looks kernels up in: the user's records and the shipped ones, of this target and of near ones.

A kernel takes the fastest record of the nearest folder that has one: first the target's own, then those of a CPU
with the same vector unit (another model, or another number of cores), and only last times that were computed and
never measured. Which folder served how many kernels is remembered, so that a build can say so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm.targets import Target
from saevit_tvm.tuning.store import MODELLED, Store, Trial, default_root, fingerprints, shipped_root

if TYPE_CHECKING:
    from tvm.ir import IRModule


@dataclass(frozen=True, eq=False)
class Source:
    """One folder of records, and what it is to the target."""

    store: Store
    shipped: bool
    near: bool

    def entry(self, kernels: int) -> dict[str, Any]:
        """For the manifest: how many kernels come from here. No path: it would tell whose machine it was."""
        return {
            "fingerprint": self.store.fingerprint,
            "kernels": kernels,
            "shipped": self.shipped,
            "near": self.near,
            "modelled": self.store.modelled,
        }


class Records:
    """The records that may serve a target, nearest first."""

    def __init__(self, sources: list[Source], target: Target) -> None:
        self.sources = sources
        self._target = target
        self._served: dict[str, Any] = {}  # the trace that each kernel got
        self._counts: Counter[Source] = Counter()

    def find(self, module: IRModule) -> Any | None:
        """MetaSchedule's record of a kernel, replayed on that very kernel; None if there is none that applies."""
        from saevit_tvm.tuning import replay

        workload = replay.workload(module)
        for source, trial, schedule in self._known(workload):
            self._served[replay.module_key(module)] = replay.plain(schedule.trace.as_json())
            self._counts[source] += 1
            return replay.as_record(workload, schedule, trial.seconds)
        return None

    def seeds(self, module: IRModule) -> list[list[Any]]:
        """The best trace of each folder, nearest first: where a search may start."""
        from saevit_tvm.tuning import replay

        found = self._known(replay.workload(module))
        return [replay.plain(schedule.trace.as_json()) for _, _, schedule in found]

    def _known(self, workload: Any) -> Iterator[tuple[Source, Trial, Any]]:
        """What each folder knows best of a kernel and that applies to it, nearest first."""
        from saevit_tvm.tuning import replay

        key = replay.module_key(workload.mod)
        for source in self.sources:
            for trial in source.store.fastest(key):
                schedule = replay.apply(workload, trial.trace)
                if schedule is not None:
                    yield source, trial, self._fitted(workload.mod, schedule, source)
                    break

    def _fitted(self, module: IRModule, schedule: Any, source: Source) -> Any:
        """A tiling found for another number of threads has its work divided among the target's."""
        from schedules.cpu.registry import cut_for
        from schedules.kernels import declared
        from schedules.machines.cpus import isa_of, threads_of
        from schedules.registry import chosen_tiling

        wanted = threads_of(self._target.tvm)
        if not source.near or threads_of(source.store.tvm or {}) == wanted or not declared(module["main"]):
            return schedule
        tiling = chosen_tiling(schedule.mod["main"])
        return cut_for(module, tiling, isa_of(self._target.tvm), wanted) if tiling else schedule

    @property
    def database(self) -> Any:
        """The same as a database of MetaSchedule's."""
        from tvm.ir.utils import derived_object
        from tvm.s_tir.meta_schedule.database import PyDatabase

        records = self

        @derived_object
        class Database(PyDatabase):
            def query_tuning_record(self, mod: IRModule, _target: Any, _name: str | None = None) -> Any | None:
                return records.find(mod)

        return Database()

    @property
    def digest(self) -> str | None:
        """Of the schedules that were served: the same digest, the same kernels."""
        lines = sorted(map(json.dumps, self._served.items()))
        return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None

    @property
    def used(self) -> list[dict[str, Any]]:
        """The folders that served kernels, nearest first, and how many each."""
        return [source.entry(self._counts[source]) for source in self.sources if source in self._counts]


def open_records(root: Path | None, target: Target) -> Records:
    """All that may serve a target, from the user's store at `root` and from what the package ships.

    The user's records of a target come before the shipped ones of the same: tuning starts from the shipped record,
    so what the store says is never slower on the user's machine.
    """
    found = []
    for place, shipped in ((root or default_root(), False), (shipped_root(), True)):
        # The architecture, or the kind of a GPU, begins the fingerprint: other folders need not be read.
        kind = target.fingerprint.split("-")[0]
        for name in (name for name in fingerprints(place) if name.startswith(f"{kind}-")):
            exact = name.removesuffix(MODELLED) == target.fingerprint
            store = Store(place, name)
            if exact or (store.tvm is not None and near(store.tvm, target.tvm)):
                found.append(Source(store, shipped, not exact))
    return Records(sorted(found, key=lambda source: _distance(source, target)), target)


def near(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether what is fast on one target is a good guess for the other."""
    from saevit_tvm import backends

    kind = one.get("kind")
    return kind == other.get("kind") and backends.get(str(kind)).alike(one, other)


def _distance(source: Source, target: Target) -> tuple[Any, ...]:
    """Sorts: measured before modelled, exact before near; of these the same CPU, the closest number of cores."""
    from schedules.machines.cpus import threads_of

    tvm = source.store.tvm or {}
    other_cpu = tvm.get("mcpu") != target.tvm.get("mcpu")
    apart = abs(math.log(threads_of(tvm) / threads_of(target.tvm)))
    how_near = (other_cpu, apart) if source.near else ()
    return source.store.modelled, source.near, how_near, source.shipped, source.store.fingerprint
