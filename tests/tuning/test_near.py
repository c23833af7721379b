"""A build with the records of a near machine: they are used, said to be near, and the result is right."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from saevit_tvm import targets
from saevit_tvm.backends import kernels_to_tune
from saevit_tvm.models.opening import open_model
from saevit_tvm.tuning import replay
from saevit_tvm.tuning.session import versions
from saevit_tvm.tuning.store import Model, Store, Trial, Workload, fingerprints, now, shipped_root
from schedules.cpu.registry import cut_for, tilings
from schedules.kernels import declared
from schedules.machines.cpus import isa_of
from schedules.registry import chosen_tiling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def near_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a machine with more cores, the last tiling that is offered for each region of a small model."""
    root, here = tmp_path_factory.mktemp("near"), targets.native()
    there = dataclasses.replace(here, tvm=here.tvm | {"num-cores": 2 + int(here.tvm["num-cores"])})
    kernels = kernels_to_tune(open_model("saevit_micro", image_size=32), here)
    found = {replay.module_key(kernel.module): kernel for kernel in kernels if declared(kernel.module["main"])}
    store = Store(root, there)
    store.add_model(
        Model("saevit_micro", (1, 3, 32, 32), {k: v.weight for k, v in found.items()}, there.tvm, versions(), now())
    )
    for key, kernel in found.items():
        schedule = tilings(kernel.module, isa_of(here.tvm))[-1]
        trace = replay.plain(schedule.trace.as_json())
        what = ("saevit_micro", kernel.name, there.fingerprint, {"id": "there"}, versions(), now())
        trial = Trial(key, replay.module_key(schedule.mod), trace, (1e-3,), None, None, *what)
        store.add(trial, Workload(key, kernel.name, replay.pack_module(kernel.module), "0"))
    return root


def test_build_uses_the_records_of_a_near_machine_and_says_so(
    near_store: Path, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (there,) = fingerprints(near_store)
    arguments = ("--model", "saevit_micro", "--image-size", "32", "--store", near_store, "--out", tmp_path)
    done = cli("build", *arguments, "--threads", "1")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.json")
    manifest = json.loads(made.read_text())
    assert manifest["target"]["tvm"] == targets.native().cut_for(1).tvm and "-1t" in made.name
    (used,) = manifest["records"]
    assert (used["fingerprint"], used["near"], used["shipped"]) == (there, True, False)
    assert used["kernels"] == manifest["kernels"]["tuned"] >= len(Store(near_store, there).workloads)
    assert manifest["verification"]["passed"]
    assert f"of {manifest['kernels']['total']} kernels, your own, measured on {there}, near this target" in done.stdout


def test_work_is_divided_anew_for_another_number_of_threads(near_store: Path) -> None:
    (there,) = fingerprints(near_store)
    store, isa = Store(near_store, there), isa_of(targets.native().tvm)
    found = {}
    for key, workload in store.workloads.items():
        kernel = replay.unpack_workload(workload.module)
        (best,) = store.best(key, 1)
        tiling = chosen_tiling(replay.apply(kernel, best.trace).mod["main"])
        cut = {n: chosen_tiling(cut_for(kernel.mod, tiling, isa, n).mod["main"]) for n in (1, 2)}
        assert all(cut[n].keys() == tiling.keys() for n in cut)
        assert {name for name in tiling if cut[1][name] != cut[2][name]} <= {"bands", "groups", "chunk"}
        assert all(cut[2][name] == value for name, value in tiling.items() if name not in ("bands", "groups", "chunk"))
        found[workload.name] = cut
    assert any(cut[1] != cut[2] for cut in found.values())


def test_what_is_shipped_applies_and_is_small() -> None:
    from saevit_tvm.verbs.logs import check

    for name in fingerprints(shipped_root()):
        (row,) = check(shipped_root(), name, repair=False, say=print)["fingerprints"]
        assert not row["damaged"]
        assert row["outdated_trials"] == 0
        assert Store(shipped_root(), name).tvm, "without it no near machine can use them"
        assert Store(shipped_root(), name).path.stat().st_size < 500_000
