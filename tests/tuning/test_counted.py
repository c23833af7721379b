"""Tuning for arm64 under qemu: costs that are counted, repeatable, and kept apart from times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from saevit_tvm import targets
from saevit_tvm.compiler.street import TunableKernel
from saevit_tvm.emulators import qemu
from saevit_tvm.measure import counted as emulated
from saevit_tvm.measure.candidates import Candidate
from saevit_tvm.measure.counted import EmulatedMeasurer
from saevit_tvm.support.errors import TargetError
from saevit_tvm.targets import Target
from saevit_tvm.tuning import replay
from saevit_tvm.tuning.records import open_records
from saevit_tvm.tuning.session import Session
from saevit_tvm.tuning.store import MODELLED, Store

lacking = qemu.missing("aarch64")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(lacking is not None, reason=lacking or "")]


@pytest.fixture(scope="module")
def board() -> Target:
    return targets.get("rpi4")


def scheduled(kernel: TunableKernel, *, parallel: bool = False) -> Candidate:
    """The kernel as it is, or with its rows over threads."""
    import tvm
    from tvm.s_tir import Schedule

    schedule = Schedule(kernel.module)
    if parallel:
        schedule.parallel(schedule.get_loops(schedule.get_sblock("C"))[0])
    source = replay.as_source(schedule)
    trace = replay.plain(schedule.trace.as_json())
    return Candidate(replay.module_key(schedule.mod), trace, tvm.ir.save_json(schedule.mod), source)


def costs(board: Target, *candidates: Candidate) -> list[float]:
    with EmulatedMeasurer(board) as measurer:
        found = {c.key: result for c, result in measurer.measure(list(candidates), float("inf"), lambda: False)}
    assert all(result.run_secs for result in found.values()), found
    return [found[candidate.key].run_secs[0] for candidate in candidates]


def test_costs_are_repeatable_and_follow_the_work(board: Target, matmul: Callable) -> None:
    small, large = scheduled(matmul()), scheduled(matmul(rows=128))
    first = costs(board, small, large)
    assert costs(board, small, large) == pytest.approx(first, rel=0.01)
    assert first[1] == pytest.approx(4 * first[0], rel=0.1), "four times the rows"
    flops = 2 * 32 * 24 * 16
    assert flops / 8 * 1e-10 < first[0] < flops * 1e-7


def test_only_the_busiest_thread_counts(board: Target, matmul: Callable) -> None:
    alone, shared = costs(board, scheduled(matmul(rows=512)), scheduled(matmul(rows=512), parallel=True))
    assert alone / 5 < shared < alone / 3, "a quarter of the work, and the price of waking four threads"


CRASHING = """
@T.prim_func
def main(A: T.Buffer((4,), "float32")):
    T.func_attr({"global_symbol": "main"})
    T.call_extern("int32", "abort")
"""


def test_a_kernel_that_crashes_is_a_failure_with_its_words(board: Target) -> None:
    import tvm

    module = tvm.IRModule({"main": tvm.script.from_source(CRASHING, extra_vars={"T": tvm.script.tirx})})
    with EmulatedMeasurer(board) as measurer:
        crashing = Candidate("crashing", [], tvm.ir.save_json(module), None)
        ((_, result),) = measurer.measure([crashing], float("inf"), lambda: False)
    assert (result.failure, result.run_secs) == ("run crashed", ())
    assert "SIGABRT" in (result.words or "")


def test_a_target_without_an_emulator_is_one_sentence() -> None:
    with pytest.raises(TargetError, match="is not one that is emulated: leave out --measure qemu"):
        EmulatedMeasurer(targets.native())


def test_what_is_modelled_stays_apart_and_serves_only_without_better(
    board: Target, tmp_path: Path, matmul: Callable
) -> None:
    modelled = Store(tmp_path, board.fingerprint + MODELLED)
    result = Session([matmul()], board, modelled, model="test", measurer=lambda: EmulatedMeasurer(board)).run(trials=6)
    assert result.valid == result.trials == 6
    (key,) = modelled.workloads
    assert all(t.target.endswith(MODELLED) and "modelled" in t.machine["cpu"] for t in modelled.of(key))
    assert not Store(tmp_path, board).trials
    records = open_records(tmp_path, board)
    assert records.find(matmul().module) is not None
    assert [used["modelled"] for used in records.used] == [True]
    real = Store(tmp_path, board)
    worst = modelled.fastest(key)[-1]
    real.add(dataclasses.replace(worst, run_secs=(1.0,), target=board.fingerprint), modelled.workloads[key])
    records = open_records(tmp_path, board)
    assert float(records.find(matmul().module).run_secs[0]) == 1.0
    assert [used["modelled"] for used in records.used] == [False]


def test_weights_name_what_the_plugin_counts() -> None:
    assert set(emulated.WEIGHTS) == set(qemu.CLASSES)
