"""A real Ray cluster on this machine: the same candidates as on one machine, and a lost node loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from saevit_tvm.support.errors import TuningError
from saevit_tvm.targets import Target
from saevit_tvm.tuning.measurers import open_measurer
from saevit_tvm.tuning.session import Session, Snapshot
from saevit_tvm.tuning.store import Store

pytest.importorskip("ray", reason="needs the extra 'cluster'")
pytestmark = pytest.mark.slow

LANES = (1, 2, 4, 8)
UNROLLS = (0, 16)


def space(_kernel: Any) -> Any:
    """Eight ready schedules: nothing is drawn at random, so two searches measure the same."""
    from tvm.s_tir import Schedule
    from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

    def schedules(schedule: Schedule) -> list[Schedule]:
        made = []
        for lanes in LANES:
            for unroll in UNROLLS:
                one = Schedule(schedule.mod)
                rows, columns, _ = one.get_loops(one.get_sblock("C"))
                one.vectorize(one.split(columns, [None, lanes])[1])
                one.annotate(rows, "pragma_auto_unroll_max_step", unroll)
                made.append(one)
        return made

    return ScheduleFn(schedules, [], [], {})


def search(
    root: Path, target: Target, matmul: Callable, cluster: str | None, **options: Any
) -> tuple[Snapshot, set[str]]:
    store = Store(root, target.fingerprint)
    session = Session(
        [matmul()],
        target,
        store,
        model="test",
        space_for=space,
        measurer=lambda: open_measurer("local", target, cluster=cluster),
        **options,
    )
    result = session.run(trials=50)
    trials = [trial for trials in store.trials.values() for trial in trials]
    assert len(trials) == len({trial.candidate for trial in trials})
    assert all(trial.valid for trial in trials), [trial.words for trial in trials]
    return result, {trial.candidate for trial in trials}


def raylets() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if is_raylet(child)]


def is_raylet(process: psutil.Process) -> bool:
    try:
        return process.name() == "raylet"
    except psutil.NoSuchProcess:  # it ended meanwhile
        return False


def test_four_nodes_measure_what_one_machine_measures(tmp_path: Path, target: Target, matmul: Callable) -> None:
    """And that although a node is killed half-way."""
    killed: list[int] = []

    def show(snapshot: Snapshot) -> None:
        if snapshot.trials == 3 and not killed:
            nodes = raylets()
            assert len(nodes) == 4
            # The head is the one that the others were told of.
            worker = next(node for node in nodes if "--head" not in " ".join(node.cmdline()))
            killed.append(worker.pid)
            worker.kill()

    _, alone = search(tmp_path / "one", target, matmul, None)
    result, together = search(tmp_path / "four", target, matmul, "local:4", show=show)
    assert killed
    assert together == alone and len(alone) == len(LANES) * len(UNROLLS)
    assert (result.trials, result.failed, result.ended) == (8, 0, "every schedule was tried")
    assert not raylets(), "the cluster ends with the search"


def test_nodes_of_another_kind_are_refused(target: Target) -> None:
    other = replace(target, tvm=target.tvm | {"num-cores": 64})
    with pytest.raises(TuningError, match=r"a node of the cluster cannot measure for target .*-64c': it is .*; use"):
        open_measurer("local", other, cluster="local:1")
    assert not raylets()


def test_no_cluster_at_the_address(target: Target) -> None:
    with pytest.raises(TuningError, match=r"no Ray cluster answers at 'ray:auto'"):
        open_measurer("local", target, cluster="ray:auto")


HOLD = """
import time
from saevit_tvm.tuning.cluster import LocalCluster
cluster = LocalCluster(1)
print("up", flush=True)
time.sleep(1000)
"""


def test_a_killed_search_leaves_no_cluster_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert sum(child.name() == "raylet" for child in started) == 1
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
