"""The search: choose a kernel, propose candidates, measure them, remember each at once, learn, and again.

The store is the only memory. A run that goes on after another, or after a kill, reads it and is where that
one was: the budget counts all trials, the cost model has learnt from all of them, and none is made twice.
Proposing, building and measuring take turns: what is measured has the machine to itself.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, Any

from saevit_tvm.measure.candidates import Candidate, Result
from saevit_tvm.measure.local import LocalMeasurer
from saevit_tvm.support.errors import TuningError
from saevit_tvm.targets import Target
from saevit_tvm.tuning import replay
from saevit_tvm.tuning.guide import CostModel
from saevit_tvm.tuning.store import Model, Store, Trial, Workload, now
from saevit_tvm.tuning.task import SpaceFor, Task

if TYPE_CHECKING:
    from saevit_tvm.compiler.street import TunableKernel
    from saevit_tvm.tuning.measurers import Measurer
    from saevit_tvm.tuning.records import Records

BATCH = 16
FIRST_BATCH = 8
PATIENCE_ROUNDS = 3  # as many rounds a kernel without progress end the search
PROGRESS = 0.005
HOPELESS_TRIALS = 24
FOREIGN_LESSONS = 16  # as many trials of each kernel of other models teach the cost model

Lesson = tuple[Any, list[Any], list[Result]]  # a kernel's context, its candidates, what they took


@dataclass
class Snapshot:
    """Where the search stands."""

    tasks: int
    tuned: int = 0
    trials: int = 0
    resumed: int = 0
    guided: int = 0
    limit: int | None = None
    seconds_left: float | None = None
    failures: Counter[str] = field(default_factory=Counter)
    best_ms: float | None = None
    modelled: bool = False  # the milliseconds are computed, not measured
    current: str = ""
    ended: str = ""

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def valid(self) -> int:
        return self.trials - self.failed


class Session:
    """One run of the search over the kernels of a model."""

    def __init__(
        self,
        kernels: Sequence[TunableKernel],
        target: Target,
        store: Store,
        *,
        model: str,
        input_shape: Sequence[int] = (),
        other_shapes: Mapping[tuple[int, ...], Sequence[TunableKernel]] | None = None,  # of the model, and its kernels
        measurer: Callable[[], Measurer] | None = None,
        seeds: Records | None = None,
        space_for: SpaceFor = lambda _kernel: None,
        features: Any = "per-store-feature",
        show: Callable[[Snapshot], None] = lambda _snapshot: None,
    ) -> None:
        import tvm

        self._tvm_target = tvm.target.Target(target.tvm)
        self._space_for = space_for
        self.target = target
        self.store = store
        self.models: list[Model] = []
        tasks = []
        for shape, needed in {tuple(input_shape): kernels, **(other_shapes or {})}.items():
            found = [Task(kernel, self._tvm_target, space_for) for kernel in needed]
            weights: Counter[str] = Counter()
            for task in found:
                weights[task.workload.key] += task.weight
            self.models.append(Model(model, shape, dict(weights), replay.plain(target.tvm), versions(), now()))
            tasks += found
        self.tasks = _distinct(tasks)
        self.guide = CostModel(features)
        self.snapshot = Snapshot(tasks=len(self.tasks), modelled=store.modelled)
        self._open_measurer = measurer or (lambda: LocalMeasurer(target))
        self._seeds = seeds
        self._show = show
        self._deadline: float | None = None
        self._history: list[float] = []  # predicted seconds an inference, after each round
        self._proven = False  # something has worked in this run
        self._unproven: list[tuple[Trial, Task]] = []  # failures from before that

    def run(self, *, trials: int | None = None, minutes: float | None = None) -> Snapshot:
        """Search until the budget is spent or nothing more is to be gained."""
        self.snapshot.limit = trials
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        with Stop() as self._stop, self.store.shared():
            for model in self.models:
                self.store.add_model(model)
            self._resume()
            self._began = time.monotonic()
            if self._left() > 0:
                with self._open_measurer() as self._measurer:
                    while self._reason_to_end() is None:
                        self._round()
            self.snapshot.ended = self._reason_to_end() or ""
            self._update()
        if self._unproven:
            raise self._nothing_worked()
        return self.snapshot

    def proposals(self, count: int) -> list[tuple[Task, Candidate]]:
        """What to measure next where this process cannot: kernels take turns, those with the most work first.

        Of each the best that is known elsewhere, what a build takes without a record, and the cost model's favourites.
        """
        self._resume()
        tasks = sorted(self.tasks, key=lambda task: -task.weight * task.flops)[:count]
        share = 2 * -(-count // max(1, len(tasks)))  # some kernels have few schedules: others fill their turns
        offers = [(task, self._first_of(task, share)) for task in tasks]
        turns = [(task, offer[turn]) for turn in range(share) for task, offer in offers if turn < len(offer)]
        return turns[:count]

    def _first_of(self, task: Task, count: int) -> list[Candidate]:
        offered = [*self._seeds_of(task), *task.default(), *task.propose(count, self.guide.model)]
        distinct: dict[str, Candidate] = {}
        for candidate in offered:
            if candidate.key not in task.seen:
                distinct.setdefault(candidate.key, candidate)
        return list(distinct.values())[:count]

    def _resume(self) -> None:
        """Take in what the store knows of these kernels, and teach the cost model what it knows of any."""
        ours = {task.workload.key: task for task in self.tasks}
        lessons = []
        for key, workload in self.store.workloads.items():
            if key in ours:
                self._recall_gone(ours[key])
                lessons.append(self._recall(ours[key]))
            elif (task := self._foreign(workload)) is not None:
                trials = self.store.of(key)
                lessons.append(_lesson(task, _replayed(task, trials[:: 1 + len(trials) // FOREIGN_LESSONS])))
        useful = [lesson for lesson in lessons if lesson is not None]
        for number, lesson in enumerate(useful, 1):
            self.guide.learn(*lesson, train=number == len(useful))
        self._update()

    def _recall_gone(self, task: Task) -> None:
        """Take in what `prune` has left of the trials of a kernel."""
        gone = self.store.gone(task.workload.key)
        task.forget(gone)
        for failure in gone.values():
            self._count(failure)
        self.snapshot.resumed += len(gone)

    def _recall(self, task: Task) -> Lesson | None:
        """Take in the trials of a kernel that others have made, earlier or beside us, and what they teach."""
        trials = [trial for trial in self.store.of(task.workload.key) if trial.candidate not in task.seen]
        replayed = _replayed(task, trials)
        for trial, schedule in replayed:
            task.remember(trial, schedule)
            self._count(trial.failure)
        self.snapshot.resumed += len(trials)
        return _lesson(task, replayed)

    def _hear(self) -> None:
        """Learn what another tuner has added to the store: it is not measured again, and counts for the budget."""
        self.store.refresh()
        for task in self.tasks:
            lesson = self._recall(task)
            if lesson is not None:
                self.guide.learn(*lesson, train=True)

    def _foreign(self, workload: Workload) -> Task | None:
        """A kernel of another model, which has something to teach as well."""
        from saevit_tvm.compiler.street import TunableKernel

        packed = replay.unpack_workload(workload.module)
        if packed is None:
            return None
        return Task(TunableKernel(workload.name, 0, packed.mod), self._tvm_target, self._space_for)

    def _round(self) -> None:
        """Measure one batch of the most rewarding kernel."""
        self._hear()
        task = max((task for task in self.tasks if not task.exhausted), key=_worth)
        self.snapshot.current = task.kernel.name
        self._update()
        candidates = self._candidates(task)
        guided = self.guide.trained
        measured: list[tuple[Candidate, Result]] = []
        for candidate, result in self._measurer.measure(candidates, task.best, self._should_stop):
            trial = self._trial(task, candidate, result)
            self._keep(task, trial)
            task.remember(trial, candidate.source.sch)
            self._count(trial.failure)
            self.snapshot.guided += guided
            measured.append((candidate, result))
            self._update()
            if len(self._unproven) >= HOPELESS_TRIALS:
                raise self._nothing_worked()
        if measured and not self._should_stop():
            self.guide.learn(
                task.context, [pair[0].source for pair in measured], [pair[1] for pair in measured], train=True
            )
        self._history.append(self._predicted() or 0.0)

    def _keep(self, task: Task, trial: Trial) -> None:
        """Write the trial down. A failure waits until something has worked in this run.

        It may be the machine's fault, whatever worked on another day, and would never be tried again.
        """
        self._unproven.append((trial, task))
        self._proven |= trial.valid
        if self._proven:
            for kept, its_task in self._unproven:
                self.store.add(kept, its_task.workload)
            self._unproven.clear()

    def _candidates(self, task: Task) -> list[Candidate]:
        new = [other for other in self.tasks if not other.curve]
        share = self._left() // max(1, len(new))  # so that a small budget reaches as many kernels as it can
        count = int(min(BATCH if task.curve else max(1, min(FIRST_BATCH, share)), self._left()))
        chosen: dict[str, Candidate] = {}
        for candidate in [*(self._seeds_of(task) if not task.curve else []), *task.propose(count, self.guide.model)]:
            chosen.setdefault(candidate.key, candidate)
        return list(chosen.values())[:count]

    def _seeds_of(self, task: Task) -> list[Candidate]:
        """The best that is known elsewhere, to be measured here before anything else."""
        traces = self._seeds.seeds(task.kernel.module) if self._seeds else []
        candidates = [task.from_trace(trace) for trace in traces]
        return [candidate for candidate in candidates if candidate is not None and candidate.key not in task.seen]

    def _trial(self, task: Task, candidate: Candidate, result: Result) -> Trial:
        return Trial(
            workload=task.workload.key,
            candidate=candidate.key,
            trace=candidate.trace,
            run_secs=result.run_secs,
            failure=result.failure,
            words=result.words,
            model=self.models[0].name,
            task=task.kernel.name,
            target=self.store.fingerprint,
            machine=self._measurer.machine,
            versions=versions(),
            time=now(),
        )

    def _count(self, failure: str | None) -> None:
        self.snapshot.trials += 1
        if failure is not None:
            self.snapshot.failures[failure] += 1

    def _left(self) -> float:
        """Trials that the budget still allows."""
        limit = self.snapshot.limit
        return float("inf") if limit is None else max(0, limit - self.snapshot.trials)

    def _should_stop(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or self._stop.asked

    def _reason_to_end(self) -> str | None:
        if self._stop.asked:
            return "stopped"
        if self._left() <= 0:
            return "the trials are spent"
        if self._should_stop():
            return "the time is up"
        if all(task.exhausted for task in self.tasks):
            return "every schedule was tried"
        rounds = PATIENCE_ROUNDS * len(self.tasks)
        if len(self._history) > rounds and self.snapshot.tuned == len(self.tasks):
            before, now = self._history[-rounds - 1], self._history[-1]
            if before and now > (1 - PROGRESS) * before:
                return f"{rounds} rounds brought nothing"
        return None

    def _predicted(self) -> float | None:
        """Seconds an inference (of each shape) spends in these kernels, once each of them has a time."""
        if any(task.best == float("inf") for task in self.tasks):
            return None
        return sum(task.weight * task.best for task in self.tasks)

    def _update(self) -> None:
        predicted = self._predicted()
        self.snapshot.best_ms = None if predicted is None else 1e3 * predicted
        self.snapshot.tuned = sum(task.best < float("inf") for task in self.tasks)
        self.snapshot.seconds_left = self._seconds_left()
        self._show(self.snapshot)

    def _seconds_left(self) -> float | None:
        """Until the deadline, or until the budget is spent at the present pace, whichever is sooner."""
        now, known = time.monotonic(), []
        if self._deadline is not None:
            known.append(max(0.0, self._deadline - now))
        done = self.snapshot.trials - self.snapshot.resumed
        if done and self.snapshot.limit is not None:
            known.append(self._left() * (now - self._began) / done)
        return min(known, default=None)

    def _nothing_worked(self) -> TuningError:
        failed = [trial for trial, _ in self._unproven]
        kinds = ", ".join(f"{kind} ({count})" for kind, count in Counter(t.failure for t in failed).most_common())
        return TuningError(
            f"none of {len(failed)} candidates could be measured: {kinds}; "
            f"the last worker's own words: {failed[-1].words}"
        )


class Stop:
    """Turns a stop signal into a request: the measurement in flight is finished, then the signal is delivered.

    An exception in the middle would surface inside a callback from C++, or between a measurement and its record.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.asked = False
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in self.SIGNALS}
            self._before = {number: handler for number, handler in handlers.items() if callable(handler)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked, self._number = True, number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked:
            self._before[self._number](self._number, None)


def _distinct(tasks: Sequence[Task]) -> list[Task]:
    """Each kernel once, whatever names it goes by; its weight is the sum of theirs."""
    found: dict[str, Task] = {}
    for task in tasks:
        first = found.setdefault(task.workload.key, task)
        if first is not task:
            first.weight += task.weight
    return list(found.values())


def _replayed(task: Task, trials: Sequence[Trial]) -> list[tuple[Trial, Any | None]]:
    """Each trial with its schedule, if it has one that still applies."""
    return [(trial, task.replayed(trial)) for trial in trials]


def _lesson(task: Task, replayed: Sequence[tuple[Trial, Any | None]]) -> Lesson | None:
    """What the cost model can learn from trials."""
    known = [(replay.as_source(schedule), Result(trial.run_secs)) for trial, schedule in replayed if schedule]
    return (task.context, [source for source, _ in known], [result for _, result in known]) if known else None


def _worth(task: Task) -> tuple[float, float]:
    return task.gain(), task.weight * task.flops


@cache
def versions() -> dict[str, str]:
    packages = {"saevit_tvm": "saevit-tvm", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
    return {name: version(package) for name, package in packages.items()}
