"""The store: what the compiler gets from it, and how it bears records that are broken, foreign or outdated."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from saevit_tvm.targets import Target
from saevit_tvm.tuning import store as store_module
from saevit_tvm.tuning.log import Log, decode, encode
from saevit_tvm.tuning.store import Store, Trial, open_records

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


def test_the_compiler_gets_the_fastest(root: Path, target: Target, matmul: Callable) -> None:
    _, trials = only(Store(root, target))
    found = open_records(root, target)
    assert found is not None
    database, digest = found
    record = database.query_tuning_record(matmul().module, None, "main")
    assert float(record.run_secs[0]) == pytest.approx(min(trial.seconds for trial in trials), rel=1e-5)
    assert digest == Store(root, target).digest()
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)


def test_nothing_is_found_in_an_empty_store_or_for_another_target(root: Path, tmp_path: Path, target: Target) -> None:
    other = dataclasses.replace(target, tvm=target.tvm | {"num-cores": 1777})
    assert open_records(tmp_path / "empty", target) is None
    assert open_records(root, other) is None
    assert not (tmp_path / "empty").exists(), "looking must not make folders"


def test_the_digest_depends_on_the_records_alone(root: Path, target: Target) -> None:
    store = Store(root, target)
    before = store.digest()
    rewrite(store, lambda records: random.sample(records, len(records)))
    assert Store(root, target).digest() == before
    _, trials = only(store)
    best = min(trials, key=lambda trial: trial.seconds)
    rewrite(store, lambda records: [r for r in records if r.get("candidate") != best.candidate])
    assert Store(root, target).digest() != before


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
    (best,) = Store(root, target).best_applicable().values()
    assert best.trial.candidate == second.candidate


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
    assert open_records(root, target) is not None


def test_a_kernel_from_another_tvm_is_passed_over(root: Path, target: Target) -> None:
    rewrite(Store(root, target), lambda records: [{**records[0], "module": "AAAA"}, *records[1:]])
    assert open_records(root, target) is None


def test_shipped_records_fill_the_gaps(
    root: Path, tmp_path: Path, target: Target, matmul: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "shipped_root", lambda: root)
    found = open_records(tmp_path / "empty", target)
    assert found is not None
    assert found[1] == Store(root, target).digest()


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

    from saevit_tvm.compiler.pipeline import Kernel
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
    kernels = [Kernel(task.task_name, int(task.weight), task.dispatched[0]) for task in tasks]
    Session(kernels, target, Store(tmp_path, target), model="graph").run(trials=3 * len(kernels))
    found = open_records(tmp_path, target)
    assert found is not None
    with tvm_target, found[0]:
        tuned = relax.transform.MetaScheduleApplyDatabase()(module)
    functions = [func for func in tuned.functions.values() if isinstance(func, tvm.tirx.PrimFunc)]
    assert len(functions) == len(kernels)
    assert all(func.attrs.get("tirx.is_scheduled") for func in functions)
    data = np.random.RandomState(1).randn(8, 16).astype("float32")
    outputs = []
    for built in (module, tuned):
        machine = relax.VirtualMachine(relax.build(built, tvm_target), tvm.cpu())
        outputs.append(machine["main"](tvm.runtime.tensor(data)).numpy())
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


def test_a_log_in_use_must_not_be_replaced(root: Path, target: Target) -> None:
    from saevit_tvm.errors import TuningError

    log = Log(Store(root, target).path)
    assert list(log.new_records())
    log.path.rename(log.path.with_suffix(".old"))
    log.path.write_text("")
    with pytest.raises(TuningError, match="replaced"):
        list(log.new_records())
