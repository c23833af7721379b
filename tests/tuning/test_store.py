"""The store: what the compiler gets from it, and how it bears records that are broken, foreign or outdated."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saevit_tvm.compiler.street import TunableKernel
from saevit_tvm.support.errors import TuningError
from saevit_tvm.targets import Target
from saevit_tvm.tuning import records as records_module
from saevit_tvm.tuning.log import Log, decode, encode
from saevit_tvm.tuning.records import Records, near, open_records
from saevit_tvm.tuning.store import MODELLED, Store, Trial

pytestmark = pytest.mark.slow


def only(store: Store) -> tuple[str, list[Trial]]:
    ((key, trials),) = store.trials.items()
    return key, list(trials)


def rewrite(store: Store, change: Callable[[list[dict]], list[dict]]) -> None:
    """Replace the file by what `change` makes of its records."""
    records = [decode(line) for line in store.path.read_bytes().splitlines(keepends=True)]
    assert all(record is not None for record in records)
    store.path.write_bytes(b"".join(map(encode, change([record for record in records if record]))))


def test_every_trial_says_what_where_and_when(root: Path, target: Target) -> None:
    key, trials = only(Store(root, target))
    for trial in trials:
        assert trial.workload == key
        assert (trial.model, trial.task, trial.target) == ("test", "matmul", target.fingerprint)
        assert set(trial.versions) == {"saevit_tvm", "tvm", "tvm_ffi"}
        assert trial.machine["cores"] >= 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", trial.time)
        assert trial.valid != (trial.failure is not None)


def served(root: Path, target: Target, kernel: TunableKernel) -> tuple[Records, Any]:
    """What the compiler gets for a kernel."""
    records = open_records(root, target)
    return records, records.database.query_tuning_record(kernel.module, None, "main")


def test_the_compiler_gets_the_fastest(root: Path, target: Target, matmul: Callable) -> None:
    _, trials = only(Store(root, target))
    records, record = served(root, target, matmul())
    assert float(record.run_secs[0]) == pytest.approx(min(trial.seconds for trial in trials), rel=1e-5)
    assert re.fullmatch("sha256:[0-9a-f]{64}", records.digest or "")
    (used,) = records.used
    assert (used["fingerprint"], used["kernels"]) == (target.fingerprint, 1)
    assert not (used["near"] or used["shipped"] or used["modelled"])


def test_nothing_is_found_in_an_empty_store_or_for_another_vector_unit(
    root: Path, tmp_path: Path, target: Target, matmul: Callable
) -> None:
    other = dataclasses.replace(target, tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"})
    for place, wanted in ((tmp_path / "empty", target), (root, other)):
        records, record = served(place, wanted, matmul())
        assert (record, records.digest, records.used) == (None, None, [])
    assert not (tmp_path / "empty").exists(), "looking must not make folders"


def test_the_digest_depends_on_the_records_alone(root: Path, target: Target, matmul: Callable) -> None:
    store = Store(root, target)
    before = served(root, target, matmul())[0].digest
    rewrite(store, lambda records: random.sample(records, len(records)))
    assert served(root, target, matmul())[0].digest == before
    _, trials = only(store)
    best = min(trials, key=lambda trial: trial.seconds)
    rewrite(store, lambda records: [r for r in records if r.get("candidate") != best.candidate])
    assert served(root, target, matmul())[0].digest != before


def test_a_trace_that_no_longer_applies_gives_way_to_the_next(root: Path, target: Target) -> None:
    store = Store(root, target)
    _, trials = only(store)
    first, second = sorted(trials, key=lambda trial: trial.seconds)[:2]

    def break_best(records: list[dict]) -> list[dict]:
        for record in records:
            if record.get("candidate") == first.candidate:
                record["trace"] = json.loads(json.dumps(record["trace"]).replace('"C"', '"D"'))
        return records

    rewrite(store, break_best)
    (best,) = Store(root, target).best(first.workload, 1)
    assert best.candidate == second.candidate


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 99},
        {"run_secs": [-1.0]},
        {"run_secs": "fast"},
        {"surprise": 1},
        {"kind": "workload"},
        {"workload": "0x0"},
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_skipped_and_counted(root: Path, target: Target, damage: dict) -> None:
    store = Store(root, target)
    _, trials = only(store)

    def spoil(records: list[dict]) -> list[dict]:
        return [*records[:3], records[3] | damage, *records[4:]]

    rewrite(store, spoil)
    reopened = Store(root, target)
    assert len(reopened.of(trials[0].workload)) == len(trials) - 1
    assert reopened.damage.broken_lines == 1
    assert reopened.best(trials[0].workload, 1)


def test_a_kernel_from_another_tvm_is_passed_over(root: Path, target: Target) -> None:
    store = Store(root, target)
    (key,) = store.workloads
    rewrite(store, lambda records: [r | {"module": "AAAA"} if r["kind"] == "workload" else r for r in records])
    assert Store(root, target).best(key, 1) == []


def test_shipped_records_fill_the_gaps(
    root: Path, tmp_path: Path, target: Target, matmul: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "shipped_root", lambda: root)
    records, record = served(tmp_path / "empty", target, matmul())
    assert record is not None
    assert [(used["shipped"], used["near"]) for used in records.used] == [(True, False)]


def test_two_processes_see_each_others_trials(root: Path, target: Target) -> None:
    mine, theirs = Store(root, target), Store(root, target)
    key, trials = only(mine)
    theirs.add(dataclasses.replace(trials[0], candidate="0x1"), theirs.workloads[key])
    mine.refresh()
    assert [trial.candidate for trial in mine.of(key)] == [*(trial.candidate for trial in trials), "0x1"]


def test_kernels_of_a_graph_are_found_and_stay_right(tmp_path: Path, target: Target) -> None:
    """From a Relax module, through tuning, to MetaScheduleApplyDatabase: all tuned, and numerically the same."""
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    from saevit_tvm.tuning.session import Session

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((8, 16), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(np.random.RandomState(0).randn(16, 16).astype("float32"))
            hidden = builder.emit(relax.op.nn.relu(relax.op.matmul(x, weight)))
            result = builder.emit_output(relax.op.matmul(hidden, weight))
        builder.emit_func_output(result)
    tvm_target = tvm.target.Target(target.tvm)
    passes = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), relax.transform.FuseOps()]
    with tvm_target:
        module = tvm.transform.Sequential([*passes, relax.transform.FuseTIR()])(builder.get())
    tasks = extract_tasks(module, tvm_target)
    kernels = [TunableKernel(task.task_name, int(task.weight), task.dispatched[0]) for task in tasks]
    Session(kernels, target, Store(tmp_path, target), model="graph").run(trials=3 * len(kernels))
    records = open_records(tmp_path, target)
    with tvm_target, records.database:
        tuned = relax.transform.MetaScheduleApplyDatabase()(module)
    functions = [func for func in tuned.functions.values() if isinstance(func, tvm.tirx.PrimFunc)]
    assert len(functions) == len(kernels)
    assert all(func.attrs.get("tirx.is_scheduled") for func in functions)
    assert [used["kernels"] for used in records.used] == [len(kernels)]
    data = np.random.RandomState(1).randn(8, 16).astype("float32")
    outputs = []
    for built in (module, tuned):
        machine = relax.VirtualMachine(relax.build(built, tvm_target), tvm.cpu())
        outputs.append(machine["main"](tvm.runtime.tensor(data)).numpy())
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def test_a_log_in_use_must_not_be_replaced(root: Path, target: Target) -> None:
    log = Log(Store(root, target).path)
    assert list(log.new_records())
    log.path.rename(log.path.with_suffix(".old"))
    log.path.write_text("")
    with pytest.raises(TuningError, match="replaced"):
        list(log.new_records())


# Near targets -----------------------------------------------------------


def with_cores(target: Target, cores: int) -> Target:
    return dataclasses.replace(target, tvm=target.tvm | {"num-cores": cores})


def test_near_is_the_same_vector_unit_whatever_the_cores() -> None:
    haswell = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell", "num-cores": 4}
    assert near(haswell, haswell | {"num-cores": 64})
    assert near(haswell, haswell | {"mcpu": "znver2"})
    assert not near(haswell, haswell | {"mcpu": "znver4"}), "AVX-512 has other vectors"
    assert not near(haswell, haswell | {"mcpu": "x86-64"})
    assert not near(haswell, {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"})
    assert not near(haswell, {"kind": "cuda", "arch": "sm_90"})


def copied(root: Path, source: Target, name: str, described: dict[str, Any], seconds: float) -> None:
    """The same trials in another folder, as if a target of that description had made them in that time."""
    store, other = Store(root, source), Store(root, name)
    (workload,) = store.workloads.values()
    other.add_model(dataclasses.replace(next(iter(store.models.values())), target=described))
    for trial in store.of(workload.key):
        other.add(dataclasses.replace(trial, run_secs=(seconds,), target=name), workload)


def test_the_nearest_records_serve_and_modelled_ones_only_when_there_are_no_others(
    root: Path, target: Target, matmul: Callable
) -> None:
    wanted, cores = with_cores(target, 12), int(target.tvm["num-cores"])
    assert cores < 8
    (used,) = first_used(root, wanted, matmul())
    assert (used["fingerprint"], used["near"]) == (target.fingerprint, True)
    closer = with_cores(target, 8)
    copied(root, target, closer.fingerprint, closer.tvm, 1e-3)
    assert first_used(root, wanted, matmul())[0]["fingerprint"] == closer.fingerprint
    copied(root, target, wanted.fingerprint + MODELLED, wanted.tvm, 1e-9)
    assert first_used(root, wanted, matmul())[0]["fingerprint"] == closer.fingerprint, "however fast it claims to be"
    for other in (target, closer):
        Store(root, other).path.unlink()
    (used,) = first_used(root, wanted, matmul())
    assert (used["modelled"], used["near"]) == (True, False)


def first_used(root: Path, target: Target, kernel: TunableKernel) -> list[dict[str, Any]]:
    records, record = served(root, target, kernel)
    assert record is not None
    return records.used


# Putting stores together and making them small ----------------------------


def history(store: Store) -> list[tuple[str, ...]]:
    return sorted(trial.identity for trials in store.trials.values() for trial in trials)


def test_merging_keeps_the_history_and_doubles_nothing(root: Path, tmp_path: Path, target: Target) -> None:
    source, into = Store(root, target), Store(tmp_path / "into", target)
    key, trials = only(source)
    before = source.path.read_bytes()
    for trial in trials[:3]:
        into.add(trial, source.workloads[key])
    elsewhere = dataclasses.replace(trials[0], machine=trials[0].machine | {"id": "another"}, run_secs=(1e-9,))
    into.add(elsewhere, source.workloads[key])
    assert into.merge(source) == len(trials) - 3
    assert Store(tmp_path / "into", target).merge(source) == 0
    merged = Store(tmp_path / "into", target)
    assert history(merged) == sorted([*history(source), elsewhere.identity])
    assert merged.fastest(key)[0].identity == elsewhere.identity
    assert merged.models.keys() == source.models.keys()
    assert [dataclasses.asdict(t) for t in merged.of(key) if t.identity == trials[5].identity] == [
        dataclasses.asdict(trials[5])
    ], "model, task, machine, versions and time come along"
    assert source.path.read_bytes() == before


def test_only_the_best_can_be_merged(root: Path, tmp_path: Path, target: Target) -> None:
    source = Store(root, target)
    key, _ = only(source)
    into = Store(tmp_path / "into", target)
    assert into.merge(source, best=2) == 2
    assert [trial.identity for trial in into.fastest(key)] == [trial.identity for trial in source.fastest(key)[:2]]
    assert into.path.stat().st_size < 20_000


def test_pruned_trials_are_counted_and_known(root: Path, tmp_path: Path, target: Target) -> None:
    store = Store(root, target)
    key, trials = only(store)
    failed = dataclasses.replace(trials[0], candidate="0x1", run_secs=(), failure="run crashed", words="ouch")
    store.add(failed, store.workloads[key])
    best = [trial.identity for trial in store.fastest(key)[:3]]
    assert store.prune(3) == len(trials) + 1 - 3
    pruned = Store(root, target)
    assert history(pruned) == sorted(best)
    assert pruned.gone(key).keys() == {trial.candidate for trial in [*trials, failed]} - {name[1] for name in best}
    assert pruned.failures(key) == {"run crashed": 1}
    assert pruned.prune(3) == 0
    assert Store(root, target).gone(key) == pruned.gone(key)
    into = Store(tmp_path / "into", target)
    into.merge(pruned)
    into.merge(pruned)
    assert Store(tmp_path / "into", target).gone(key) == pruned.gone(key)


def test_what_applies_no_more_does_not_crowd_out_what_does(root: Path, target: Target) -> None:
    store = Store(root, target)
    key, _ = only(store)
    fastest = store.fastest(key)[0]
    stale = dataclasses.replace(fastest, candidate="0x1", run_secs=(1e-9,), trace=[[["Nonsense", [], [], []]], []])
    store.add(stale, store.workloads[key])
    store.prune(1)
    assert [trial.candidate for trial in Store(root, target).of(key)] == [fastest.candidate]


def test_a_store_in_use_is_not_pruned(root: Path, target: Target) -> None:
    with Store(root, target).shared(), pytest.raises(TuningError, match="in use by a running tuner"):
        Store(root, target).prune(1)


def test_a_models_latency_is_predicted_when_all_its_kernels_have_a_time(root: Path, target: Target) -> None:
    store = Store(root, target)
    key, _ = only(store)
    (model,) = store.models.values()
    assert (model.name, model.kernels, model.target) == ("test", {key: 2}, target.tvm)
    assert store.predicted(model) == pytest.approx(2 * store.fastest(key)[0].seconds)
    assert store.predicted(dataclasses.replace(model, kernels={key: 2, "0x2": 1})) is None
    store.add_model(dataclasses.replace(model, time="later"))
    assert Store(root, target).models == store.models, "nothing new, nothing written"
