"""One kernel being tuned: its space of schedules, what was measured of it, and what to try next.

The space, the evolution and the cost model are MetaSchedule's. What is added: a candidate that any earlier run
measured is not proposed again, and every trial of the store feeds the search, not only those of this process.
"""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from saevit_tvm.backends.cpu import default_space
from saevit_tvm.measure.candidates import Candidate
from saevit_tvm.support.cpu import cores
from saevit_tvm.tuning import replay
from saevit_tvm.tuning.store import Trial, Workload

if TYPE_CHECKING:
    from saevit_tvm.compiler.street import TunableKernel

SpaceFor = Callable[["TunableKernel"], Any]

POPULATION, GENERATIONS = 128, 3
FIRST_POPULATION, FIRST_GENERATIONS = 32, 1  # replaying a trace takes 10 ms and more: a first look is brief
EXPLORE = 0.06  # the share of candidates taken at random from behind the cost model's favourites
WINDOW = 32  # trials back to look for recent progress
UNLIMITED = 10**9

_silent = logging.getLogger("saevit_tvm.tuning.search")
_silent.setLevel(logging.CRITICAL)


class Task:
    """A kernel and the state of its search."""

    def __init__(self, kernel: TunableKernel, target: Any, space_for: SpaceFor) -> None:
        import tvm

        self.kernel = kernel
        self.weight = kernel.weight
        self.target = target
        self.workload = Workload(
            key=replay.module_key(kernel.module),
            name=kernel.name,
            module=replay.pack_module(kernel.module),
            tvm=tvm.__version__,
        )
        self.seen: set[str] = set()
        self.curve: list[float] = []  # the best time after each trial
        self.exhausted = False
        self._space_for = space_for

    @property
    def best(self) -> float:
        return self.curve[-1] if self.curve else float("inf")

    @functools.cached_property
    def flops(self) -> float:
        """Operations, or for a declaration, which has no loops to count them in, the numbers that it touches."""
        from tvm.s_tir.analysis import estimate_tir_flops

        buffers = self.kernel.module["main"].params
        touched = sum(math.prod(int(extent) for extent in buffer.shape) for buffer in buffers)
        return float(estimate_tir_flops(self.kernel.module) or touched)

    @functools.cached_property
    def context(self) -> Any:
        return self._make_context(POPULATION, GENERATIONS)

    @functools.cached_property
    def _first_context(self) -> Any:
        return self._make_context(FIRST_POPULATION, FIRST_GENERATIONS)

    def _make_context(self, population: int, generations: int) -> Any:
        """MetaSchedule's context, but not by its constructor: that imports `tensor_intrin`, half a minute."""
        from tvm.s_tir.meta_schedule import _ffi_api
        from tvm.s_tir.meta_schedule.logging import get_logging_func
        from tvm.s_tir.meta_schedule.search_strategy import EvolutionarySearch

        strategy = EvolutionarySearch(
            population_size=population, genetic_num_iters=generations, eps_greedy=0.0, init_min_unmeasured=1
        )
        context = _ffi_api.TuneContext(
            self.kernel.module,
            self.target,
            self._space_for(self.kernel) or default_space(),
            strategy,
            self.kernel.name,
            cores(),
            random.randrange(1, 2**30),
            get_logging_func(_silent),
        )
        _ffi_api.TuneContextInitialize(context)
        return context

    @functools.cached_property
    def _spaces(self) -> list[Any]:
        return list(self.context.generate_design_space())

    @functools.cached_property
    def _known(self) -> Any:
        """The valid trials, for the search to start from."""
        from tvm.s_tir.meta_schedule.database import MemoryDatabase

        return MemoryDatabase()

    @functools.cached_property
    def _packed(self) -> Any:
        return self._known.commit_workload(self.kernel.module)

    def remember(self, trial: Trial, schedule: Any) -> None:
        """Take in a trial, made now or earlier, and its schedule if there is one."""
        self.seen.add(trial.candidate)
        self.curve.append(min(self.best, trial.seconds))
        if trial.valid and schedule is not None:
            self._known.commit_tuning_record(replay.as_record(self._packed, schedule, trial.seconds))

    def forget(self, candidates: Collection[str]) -> None:
        """Candidates that were measured once and are known by name only: they count, and are not proposed again."""
        self.seen.update(candidates)
        self.curve += [float("inf")] * len(candidates)

    def replayed(self, trial: Trial) -> Any | None:
        """The schedule of a valid trial, if it still applies."""
        return replay.apply(self._packed, trial.trace) if trial.valid else None

    def gain(self) -> float:
        """What another trial may save an inference, in seconds: by recent progress, or by how little was tried.

        A kernel that nothing is known of comes before all others, the one with the most work first.
        """
        tried = len(self.curve)
        if self.best == float("inf"):
            return float("inf") if tried < WINDOW else 0.0
        earlier = self.curve[max(0, tried - 1 - WINDOW)]
        recent = 0.0 if earlier == float("inf") else (earlier - self.best) / min(tried, WINDOW)
        return self.weight * max(recent, 0.2 * self.best / tried)

    def from_trace(self, trace: list[Any]) -> Candidate | None:
        """The candidate of a trace found elsewhere, if it applies here."""
        schedule = replay.apply(self._packed, trace)
        return (
            None if schedule is None else self._candidate(replay.as_source(schedule), replay.module_key(schedule.mod))
        )

    def default(self) -> list[Candidate]:
        """The schedule that a build takes without a record, where it is the first of the space."""
        first = [] if self._has_decisions else list(self._ready.items())[:1]
        return [self._candidate(source, key) for key, source in first]

    def propose(self, count: int, model: Any) -> list[Candidate]:
        """The most promising candidates that were never measured, fewer when the space has no more."""
        offered = self._evolved(count, model) if self._has_decisions else self._all(model)
        chosen = _mostly_first(list(offered.items()), count)
        self.exhausted = not chosen
        return [self._candidate(source, key) for key, source in chosen]

    @functools.cached_property
    def _has_decisions(self) -> bool:
        return any(len(schedule.trace.decisions) for schedule in self._spaces)

    @functools.cached_property
    def _ready(self) -> dict[str, Any]:
        """A space of ready schedules as candidates, by their keys."""
        return _by_key(replay.as_source(schedule) for schedule in self._spaces)

    def _all(self, model: Any) -> dict[str, Any]:
        """A space of ready schedules has nothing to evolve: all of them, the most promising first."""
        unseen = [(key, source) for key, source in self._ready.items() if key not in self.seen]
        if not unseen:
            return {}
        scores = model.predict(self.context, [source for _, source in unseen])
        return dict(unseen[index] for index in scores.argsort()[::-1])

    def _evolved(self, count: int, model: Any) -> dict[str, Any]:
        """The favourites of MetaSchedule's evolution, in order.

        It does not know what earlier runs measured, so it is asked for as many more; and it is asked afresh each
        time, because it never offers anything twice.
        """
        asked = 2 * count + len(self.seen)
        context = self.context if self.curve else self._first_context
        context.pre_tuning(UNLIMITED, asked, self._spaces, self._known, model)
        try:
            offered = _by_key(context.generate_measure_candidates() or [])
        finally:
            context.post_tuning()
        return {key: source for key, source in offered.items() if key not in self.seen}

    def _candidate(self, source: Any, key: str) -> Candidate:
        import tvm

        return Candidate(
            key=key,
            trace=replay.plain(source.sch.trace.as_json()),
            module_json=tvm.ir.save_json(source.sch.mod),
            source=source,
        )


def _by_key(sources: Iterable[Any]) -> dict[str, Any]:
    """Candidates by the hash of their loops; of two that come to the same, the first."""
    found: dict[str, Any] = {}
    for source in sources:
        found.setdefault(replay.module_key(source.sch.mod), source)
    return found


def _mostly_first(ordered: list[Any], count: int) -> list[Any]:
    explored = sum(random.random() < EXPLORE for _ in range(count))
    first, rest = ordered[: count - explored], ordered[count - explored :]
    return first + random.sample(rest, min(explored, len(rest)))
