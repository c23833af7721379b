"""The search, for real: it finds, resumes, and survives crashed and hanging workers, signals and its own death."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from saevit_tvm.errors import TuningError
from saevit_tvm.targets import Target
from saevit_tvm.tuning import measure, progress
from saevit_tvm.tuning.session import Session, Snapshot
from saevit_tvm.tuning.store import Store

pytestmark = pytest.mark.slow

SEARCH = Path(__file__).with_name("search.py")
TRIALS = 10  # in the store of `root`


def candidates(store: Store) -> list[str]:
    return [trial.candidate for trials in store.trials.values() for trial in trials]


def test_a_search_goes_on_where_the_last_one_ended(root: Path, target: Target, matmul: Callable) -> None:
    store = Store(root, target)
    seen: list[int] = []
    show: Callable[[Snapshot], None] = lambda snapshot: seen.append(snapshot.trials)  # noqa: E731
    result = Session([matmul()], target, store, model="test", show=show).run(trials=TRIALS + 12)
    assert (result.trials, result.resumed) == (TRIALS + 12, TRIALS)
    assert result.guided == 12, "the cost model must know the earlier trials before the first new candidate"
    assert len(candidates(Store(root, target))) == TRIALS + 12
    assert len(set(candidates(Store(root, target)))) == TRIALS + 12, "nothing is measured twice"
    assert seen == sorted(seen)
    best = min(trial.seconds for trials in store.trials.values() for trial in trials)
    assert result.best_ms == pytest.approx(1e3 * 2 * best)  # the kernel is called twice an inference


def test_a_spent_budget_measures_nothing(root: Path, target: Target, matmul: Callable) -> None:
    result = Session([matmul()], target, Store(root, target), model="test").run(trials=TRIALS)
    assert (result.trials, result.resumed, result.ended) == (TRIALS, TRIALS, "the trials are spent")
    assert len(candidates(Store(root, target))) == TRIALS


def test_one_kernel_under_two_names_is_one_task(root: Path, target: Target, matmul: Callable) -> None:
    session = Session([matmul(), matmul()], target, Store(root, target), model="test")
    assert [task.weight for task in session.tasks] == [4]


def test_a_kernel_starts_from_what_is_known_elsewhere(
    root: Path, tmp_path: Path, target: Target, matmul: Callable
) -> None:
    known, store = Store(root, target), Store(tmp_path / "own", target)
    Session([matmul()], target, store, model="test", seeds=known).run(trials=2)
    ((best),) = known.best_applicable().values()
    assert candidates(store)[0] == best.trial.candidate


def test_a_space_without_decisions_is_tried_to_its_end(tmp_path: Path, target: Target, matmul: Callable) -> None:
    from tvm.s_tir import Schedule
    from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

    def schedules(schedule: Schedule) -> list[Schedule]:
        made = []
        for lanes in (2, 4, 8):
            one = Schedule(schedule.mod)
            one.vectorize(one.split(one.get_loops(one.get_sblock("C"))[1], [None, lanes])[1])
            made.append(one)
        return made

    result = Session(
        [matmul()], target, Store(tmp_path, target), model="test", space_for=lambda _: ScheduleFn(schedules, [], [], {})
    ).run(trials=50)
    assert (result.trials, result.valid, result.ended) == (3, 3, "every schedule was tried")


def test_workers_that_die_crash_or_hang_are_replaced(
    root: Path, target: Target, matmul: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two jobs, crashed in the middle of one, stopped: each costs one candidate."""
    monkeypatch.setattr(measure, "RUN_SECONDS", 4.0)
    harm = {TRIALS + 1: signal.SIGKILL, TRIALS + 4: signal.SIGSEGV, TRIALS + 7: signal.SIGSTOP}

    def show(snapshot: Snapshot) -> None:
        number = harm.pop(snapshot.trials, None)
        runner = session._measurer.runner.process.pid if number else 0
        if number == signal.SIGSEGV:
            threading.Timer(0.05, os.kill, (runner, number)).start()
        elif number:
            os.kill(runner, number)

    session = Session([matmul()], target, Store(root, target), model="test", show=show)
    result = session.run(trials=TRIALS + 10)
    assert not harm
    assert result.trials == TRIALS + 10
    assert result.failures == {"run crashed": 2, "run timed out": 1}
    (trials,) = Store(root, target).trials.values()
    words = [trial.words or "" for trial in trials if not trial.valid]
    assert "SIGKILL" in words[0]
    assert "Segfault" in words[1] and "SIGSEGV" in words[1]


def test_when_nothing_works_the_cause_is_named_and_nothing_kept(
    tmp_path: Path, target: Target, matmul: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler to link with
    monkeypatch.delenv("CXX", raising=False)
    store = Store(tmp_path / "store", target)
    with pytest.raises(TuningError, match=r"none of 8 candidates.*build failed \(8\).*own words: .*\S"):
        Session([matmul()], target, store, model="test").run(trials=8)
    assert candidates(Store(tmp_path / "store", target)) == []


def test_a_worker_that_cannot_start_is_one_sentence(
    tmp_path: Path, target: Target, matmul: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tvm.py").write_text("raise ImportError('this TVM is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TuningError, match=r"does not start.*this TVM is broken"):
        Session([matmul()], target, Store(tmp_path, target), model="test").run(trials=2)


@contextmanager
def searching(root: Path, trials: int) -> Iterator[subprocess.Popen[str]]:
    """A search in a process of its own, from the moment it measures."""
    command = [sys.executable, str(SEARCH), str(root), str(trials)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        before = process.stdout.readline()
        while (line := process.stdout.readline()) == before:
            pass
        assert line.strip().isdigit()
        try:
            yield process
        finally:
            process.kill()


def test_sigkill_loses_only_the_measurement_in_flight(root: Path, target: Target) -> None:
    known = TRIALS
    for _ in range(2):
        with searching(root, 10_000) as process:
            workers = psutil.Process(process.pid).children(recursive=True)
            time.sleep(random.random() * 2)
            process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            reported = [int(line) for line in process.stdout.read().split()]
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "no worker may outlive the search"
        store = Store(root, target)
        store.repair()
        found = candidates(store)
        assert store.damage.broken_lines == 0
        assert len(found) == len(set(found))
        latest = max(reported, default=known + 1)
        assert latest <= len(found) <= latest + 1
        known = len(found)


def test_ctrl_c_keeps_everything_and_ends_the_workers(root: Path, target: Target) -> None:
    with searching(root, 10_000) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert process.returncode != 0
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    latest = max([TRIALS + 1, *map(int, out.split())])
    assert len(candidates(Store(root, target))) == latest


def test_plain_progress_says_what_counts(root: Path, target: Target, matmul: Callable) -> None:
    lines: list[str] = []
    Session([matmul()], target, Store(root, target), model="test", show=progress.plain(lines.append)).run(trials=TRIALS)
    assert "trials 10/10, kernels 1/1, predicted 0.0" in lines[-1]
    assert lines[-1].endswith("the trials are spent")


def test_the_verb_tunes_a_model_and_build_finds_its_records(tmp_path: Path) -> None:
    from saevit_tvm.tuning.store import open_records
    from saevit_tvm.verbs.tune import tune

    said: list[str] = []
    summary = tune(model="saevit_micro", image_size=32, trials=2, store=tmp_path, say=said.append)
    assert summary["trials"] == summary["valid"] + summary["failed"] == 2
    assert summary["seconds"] > 0
    assert json.loads(json.dumps(summary)) == summary
    assert "the trials are spent" in said[-1]
    path = Path(summary["store"])
    with path.open("ab") as file:
        file.write(b"half a rec")
    from saevit_tvm import targets

    assert (open_records(tmp_path, targets.native()) is None) == (summary["valid"] == 0)
    tune(model="saevit_micro", image_size=32, trials=2, store=tmp_path, say=said.append)
    assert any("cut off 10 bytes" in line for line in said)
