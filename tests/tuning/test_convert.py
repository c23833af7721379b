"""Stores of version 0.1.0 serve this one: `data/0.1.0` was written by it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from saevit_tvm import backends, targets
from saevit_tvm.compiler import street
from saevit_tvm.models.opening import open_model
from saevit_tvm.tuning.log import decode
from saevit_tvm.tuning.store import Store, fingerprints

OLD = Path(__file__).parent / "data" / "0.1.0"
CPU, GPU = sorted(fingerprints(OLD), reverse=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "store"))


@pytest.mark.slow
def test_kernels_are_known_by_their_specs(root: Path) -> None:
    """Exactly the specs that a build asks for."""
    source, target = open_model("saevit_xs"), targets.get("x86-64-v3", 2)
    kernels = backends.kernels_to_tune(source, target)
    wanted = {street_key(kernel) for kernel in kernels}
    store = Store(root, CPU)
    assert len(store.workloads) == 10 and store.workloads.keys() <= wanted
    assert store.models["saevit_xs 1x3x224x224"].kernels.keys() & wanted == store.workloads.keys()
    assert not store.damage.broken_lines


def street_key(kernel: street.TunableKernel) -> str:
    from saevit_tvm.tuning import replay

    return replay.module_key(kernel.module)


@pytest.mark.parametrize("name", [CPU, GPU])
def test_its_trials_apply(root: Path, name: str) -> None:
    from saevit_tvm.tuning import replay

    store = Store(root, name)
    for key, workload in store.workloads.items():
        (trial,) = store.best(key, 1)
        schedule = replay.apply(replay.unpack_workload(workload.module), trial.trace)
        assert trial.candidate == replay.module_key(schedule.mod), "a search would measure it again"


def test_of_a_gpu_too(root: Path) -> None:
    from schedules.gpu.registry import kernel_of
    from schedules.spec import KernelSpec

    store = Store(root, GPU)
    assert len(store.workloads) == 5 and all(key.startswith("{") for key in store.workloads)
    for key, workload in store.workloads.items():
        from saevit_tvm.tuning import replay

        kernel = kernel_of(replay.unpack_workload(workload.module).mod["main"])
        assert kernel is not None and kernel.spec == KernelSpec.parse(key)


def test_reading_changes_nothing_and_what_is_added_has_todays_keys(root: Path) -> None:
    store = Store(root, CPU)
    before = store.path.read_bytes()
    key, workload = next(iter(store.workloads.items()))
    (trial,) = store.of(key)
    assert store.path.read_bytes() == before
    store.add(trial, workload)
    added = store.path.read_bytes().removeprefix(before).splitlines(keepends=True)
    assert [decode(line)["workload"] for line in added] == [key]
    assert len(Store(root, CPU).of(key)) == 2


def test_merging_and_pruning(root: Path, tmp_path: Path) -> None:
    new = Store(tmp_path / "new", CPU)
    assert new.merge(Store(root, CPU)) == 10
    assert new.merge(Store(root, CPU)) == 0
    keys = [decode(line).get("workload", "{") for line in new.path.read_bytes().splitlines(keepends=True)]
    assert len(keys) == 21 and all(key.startswith("{") for key in keys)
    old = Store(root, CPU)
    assert old.prune(1) == 0
    assert len(Store(root, CPU).workloads) == 10
