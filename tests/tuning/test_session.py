"""The search, for real: it finds, resumes, and survives crashed and hanging workers, signals and its own death."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from saevit_tvm import targets
from saevit_tvm.measure import local
from saevit_tvm.measure.candidates import Candidate, Result
from saevit_tvm.support.errors import TuningError
from saevit_tvm.targets import Target
from saevit_tvm.tuning import progress, replay
from saevit_tvm.tuning.records import open_records
from saevit_tvm.tuning.session import FIRST_BATCH, Session, Snapshot
from saevit_tvm.tuning.store import Store

pytestmark = pytest.mark.slow

SEARCH = Path(__file__).with_name("search.py")
TRIALS = 10  # in the store of `root`
KILLS = int(os.environ.get("SAEVIT_TVM_KILLS", "2"))


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
    """From another folder of the same target, and from that of a near one."""
    key, _ = next(iter(Store(root, target).trials.items()))
    best = Store(root, target).fastest(key)[0]
    more_cores = dataclasses.replace(target, tvm=target.tvm | {"num-cores": 1 + int(target.tvm["num-cores"])})
    for wanted in (target, more_cores):
        store = Store(tmp_path / "own", wanted)
        seeds = open_records(root, wanted)
        Session([matmul()], wanted, store, model="test", seeds=seeds, measurer=Even).run(trials=2)
        assert candidates(store)[0] == best.candidate


class Even:
    """A machine on which kernels of a name all take as long, so that only the policy of the search is seen."""

    kind = "local"

    def __init__(self, seconds: dict[str, float] | None = None, failure: str | None = None) -> None:
        self.machine = {"id": "even", "cpu": "none", "cores": 1}
        self.seconds = seconds or {}
        self.failure = failure

    def __enter__(self) -> Even:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(
        self, candidates: Sequence[Candidate], best: float, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Candidate, Result]]:
        for candidate in candidates:
            rows = str(candidate.source.args_info[0].shape[0])
            worked = Result(run_secs=(self.seconds.get(rows, 1e-3),))
            yield candidate, Result(failure=self.failure, words="broken") if self.failure else worked


def test_a_search_that_finds_nothing_better_ends_by_itself(tmp_path: Path, target: Target, matmul: Callable) -> None:
    result = Session([matmul()], target, Store(tmp_path, target), model="test", measurer=Even).run()
    assert result.ended == "3 rounds brought nothing"
    assert result.trials <= 16 * 5


def test_the_kernel_with_the_most_time_gets_the_most_trials(tmp_path: Path, target: Target, matmul: Callable) -> None:
    store, kernels = Store(tmp_path, target), [matmul(), matmul(rows=64)]
    measurer = lambda: Even({"32": 1e-4, "64": 1e-2})  # noqa: E731
    Session(kernels, target, store, model="test", measurer=measurer).run(trials=56)
    short, long = (store.of(replay.module_key(kernel.module)) for kernel in kernels)
    assert len(short) >= FIRST_BATCH, "a floor for every kernel"
    assert len(long) > 3 * len(short)


def test_a_small_budget_reaches_every_kernel(tmp_path: Path, target: Target, matmul: Callable) -> None:
    store = Store(tmp_path, target)
    Session([matmul(), matmul(rows=64)], target, store, model="test", measurer=Even).run(trials=5)
    assert sorted(map(len, store.trials.values())) == [2, 3]


def test_trials_say_who_measured(tmp_path: Path, target: Target, matmul: Callable) -> None:
    store = Store(tmp_path, target)
    Session([matmul()], target, store, model="test", measurer=Even).run(trials=2)
    assert {trial.machine["id"] for trials in store.trials.values() for trial in trials} == {"even"}


def test_pruned_candidates_are_not_measured_again(root: Path, target: Target, matmul: Callable) -> None:
    before = set(candidates(Store(root, target)))
    Store(root, target).prune(2)
    store = Store(root, target)
    result = Session([matmul()], target, store, model="test", measurer=Even).run(trials=TRIALS + 20)
    assert (result.trials, result.resumed) == (TRIALS + 20, TRIALS), "the budget still counts them"
    assert len(candidates(store)) == 2 + 20
    assert len(before | set(candidates(store))) == TRIALS + 20


@pytest.mark.parametrize("known", [4, FIRST_BATCH])
def test_what_another_tuner_measures_meanwhile_is_not_measured_again(
    known: int, tmp_path: Path, target: Target, matmul: Callable
) -> None:
    """A second search on the same store, in the middle of a batch of the first, and after its last measurement."""
    others: set[str] = set()
    shown: list[int] = []

    def show(snapshot: Snapshot) -> None:
        shown.append(snapshot.trials)
        if snapshot.trials == known and not others:
            store = Store(tmp_path, target)
            Session([matmul()], target, store, model="test", measurer=Even).run(trials=known + 12)
            others.update(candidates(store)[known:])

    store = Store(tmp_path, target)
    result = Session([matmul()], target, store, model="test", measurer=Even, show=show).run(trials=28)
    found = candidates(Store(tmp_path, target))
    assert len(others) == 12 <= result.resumed
    # Those that were under way when the other began may be measured twice, no others.
    assert len(found) - len(set(found)) <= FIRST_BATCH - known
    assert (result.trials, len(set(found))) == (28, 28)
    assert FIRST_BATCH + 1 not in shown, "what it hears of counts before the next batch"


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

    def searched(**more: Any) -> Snapshot:
        space = ScheduleFn(schedules, [], [], {})
        session = Session([matmul()], target, Store(tmp_path, target), model="test", space_for=lambda _: space, **more)
        return session.run(trials=50)

    result = searched()
    assert (result.trials, result.valid, result.ended) == (3, 3, "every schedule was tried")
    Store(tmp_path, target).prune(1)
    again = searched(measurer=Even)
    assert (again.trials, again.resumed, again.ended) == (3, 3, "every schedule was tried"), "nor what was pruned"
    assert len(candidates(Store(tmp_path, target))) == 1


def test_workers_that_die_crash_or_hang_are_replaced(
    root: Path, target: Target, matmul: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two jobs, crashed in the middle of one, stopped: each costs one candidate."""
    monkeypatch.setattr(local, "RUN_SECONDS", 10.0)
    harm = {TRIALS + 1: signal.SIGKILL, TRIALS + 4: signal.SIGSEGV, TRIALS + 7: signal.SIGSTOP}

    def show(snapshot: Snapshot) -> None:
        number = harm.pop(snapshot.trials, None)
        if number:
            assert session._measurer.runner.ready(wait=120)  # one that dies before is another matter
        runner = session._measurer.runner.process.pid if number else 0
        if number == signal.SIGSEGV:
            threading.Timer(0.05, os.kill, (runner, number)).start()
        elif number:
            os.kill(runner, number)

    session = Session([matmul()], target, Store(root, target), model="test", show=show)
    result = session.run(trials=TRIALS + 10)
    assert not harm
    assert result.trials == TRIALS + 10
    # On a busy machine the second signal may come between two candidates, too, and cost none.
    crashed = result.failures["run crashed"]
    assert crashed in (1, 2) and result.failures == {"run crashed": crashed, "run timed out": 1}
    (trials,) = Store(root, target).trials.values()
    words = [trial.words or "" for trial in trials if not trial.valid]
    assert "SIGKILL" in words[0]
    assert crashed == 1 or ("Segfault" in words[1] and "SIGSEGV" in words[1])


def test_when_nothing_works_the_cause_is_named_and_nothing_kept(
    tmp_path: Path, target: Target, matmul: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no linking today >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    store = Store(tmp_path / "store", target)
    with pytest.raises(TuningError, match=r"none of 8 candidates.*build failed \(8\).*own words: .*no linking today"):
        Session([matmul()], target, store, model="test").run(trials=8)
    assert candidates(Store(tmp_path / "store", target)) == []


def test_failures_of_a_day_when_nothing_works_are_not_kept(root: Path, target: Target, matmul: Callable) -> None:
    """Whatever worked on another day: a broken machine must not use up the candidates and the budget."""
    before = candidates(Store(root, target))
    broken = lambda: Even(failure="build failed")  # noqa: E731
    with pytest.raises(TuningError, match=r"none of 24 candidates could be measured: build failed \(24\); .*: broken"):
        Session([matmul()], target, Store(root, target), model="test", measurer=broken).run(trials=1000)
    assert candidates(Store(root, target)) == before


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
    # Whoever runs the tests in the background may have had Ctrl-C ignored, which children inherit.
    heed: Callable[[], Any] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=heed) as process:
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
    for _ in range(KILLS):
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
        print(f"{len(found) - known} trials, {len(found) - latest} of them not reported yet")  # pytest -rP shows it
        known = len(found)


def test_a_running_search_bears_a_merge_and_forbids_to_prune(root: Path, tmp_path: Path, target: Target) -> None:
    other = Store(Path(shutil.copytree(root, tmp_path / "other")), target)
    (key,) = other.workloads
    other.add(dataclasses.replace(other.of(key)[0], candidate="0x1"), other.workloads[key])
    with searching(root, 10_000) as process:
        assert Store(root, target).merge(other) == 1
        with pytest.raises(TuningError, match="in use by a running tuner"):
            Store(root, target).prune(1)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        assert Store(root, target).merge(other) == 0
        assert process.poll() is None
    store = Store(root, target)
    assert store.damage.broken_lines == 0
    found = candidates(store)
    assert len(found) == len(set(found)) > TRIALS + 3


def test_a_full_disk_ends_the_search_and_loses_nothing(
    tmp_path: Path, searched_root: Path, target: Target, matmul: Callable
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        store, shown = Store(disk, target), []
        with pytest.raises(TuningError, match=r"No space left on device.*everything measured before is kept"):
            Session(
                [matmul(4, 4, 4)], target, store, model="test", measurer=Even, show=lambda s: shown.append(s.trials)
            ).run(trials=500)
        kept = len(candidates(Store(disk, target)))
        assert shown[-1] == kept > 5
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = Session([matmul(4, 4, 4)], target, Store(disk, target), model="test", measurer=Even)
        result = again.run(trials=kept + 3)
        assert (result.resumed, result.trials) == (kept, kept + 3)
        assert len(set(candidates(Store(disk, target)))) == kept + 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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
    from saevit_tvm.verbs.tune import tune

    said: list[str] = []
    summary = tune(model="saevit_micro", image_size=32, trials=2, store=tmp_path, threads=1, say=said.append)
    assert summary["trials"] == summary["valid"] + summary["failed"] == 2
    assert summary["target"] == targets.native().cut_for(1).fingerprint
    assert summary["seconds"] > 0
    assert json.loads(json.dumps(summary)) == summary
    assert "the trials are spent" in said[-1]
    path = Path(summary["store"])
    with path.open("ab") as file:
        file.write(b"half a rec")
    store = Store(tmp_path, summary["target"])
    (model,) = store.models.values()
    assert (model.name, model.input_shape) == ("saevit_micro", (1, 3, 32, 32))
    assert store.trials.keys() <= model.kernels.keys()
    tune(model="saevit_micro", image_size=32, trials=2, store=tmp_path, threads=1, say=said.append)
    assert any("cut off 10 bytes" in line for line in said)


def test_kernels_of_each_batch_are_tuned_together(tmp_path: Path, target: Target, matmul: Callable) -> None:
    """Both shapes are remembered, and a kernel that both need is one task."""
    store, one, both = Store(tmp_path, target), matmul(), matmul(rows=64)
    Session([both], target, store, model="test", input_shape=(4,), other_shapes={(1,): [one, both]}).run(trials=4)
    by_shape = {model.input_shape: set(model.kernels) for model in store.models.values()}
    assert by_shape[(4,)] < by_shape[(1,)] == store.trials.keys()
