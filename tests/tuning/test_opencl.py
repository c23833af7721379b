"""Tuning for an OpenCL device: real measurements by its driver (PoCL), and a build that uses what they found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm import targets
from saevit_tvm.runtime import opencl
from saevit_tvm.tuning.measure import LocalMeasurer
from saevit_tvm.tuning.session import Session
from saevit_tvm.tuning.store import Store

TARGET = "generic-opencl"
pytestmark = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("SAEVIT_TVM_CACHE")
    os.environ["SAEVIT_TVM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("SAEVIT_TVM_CACHE")
    if before is not None:
        os.environ["SAEVIT_TVM_CACHE"] = before


def declared(kernel: Any) -> Any:
    """A kernel as the pipeline hands it to tuning."""
    import tvm

    from saevit_tvm.compiler.pipeline import Kernel
    from schedules.gpu.declare import declare

    return Kernel(kernel.NAME, 1, tvm.IRModule({"main": declare(kernel).with_attr("global_symbol", "main")}))


def test_candidates_are_measured_on_the_device(tmp_path: Path) -> None:
    from saevit_tvm.tuning.space import Features, space_for
    from schedules.gpu.conv import Conv

    target = targets.get(TARGET)
    kernels = [declared(Conv(1, 4, 4, 16, 16, dtype=dtype, given=dtype)) for dtype in ("float32", "float16")]
    store = Store(tmp_path, target)
    session = Session(
        kernels,
        target,
        store,
        model="test",
        measurer=lambda: LocalMeasurer(target, builders=1),
        space_for=lambda kernel: space_for(kernel, target),
        features=Features(),
    )
    result = session.run(trials=4)
    trials = [trial for task in session.tasks for trial in store.of(task.workload.key)]
    assert [trial.words for trial in trials if not trial.valid] == []
    assert result.trials == len({trial.candidate for trial in trials}) == 4
    assert all(trial.machine["device"] == opencl.devices()[0].name for trial in trials)


@pytest.mark.slow
def test_a_build_uses_what_tuning_found(cli: Callable[..., Any], tmp_path: Path) -> None:
    chosen = ["--target", TARGET, "--model", "saevit_micro", "--image-size", "32", "--store", tmp_path / "store"]
    tuned = cli("tune", *chosen, "--trials", "4", "--json")
    assert tuned.returncode == 0, tuned.stderr
    found = json.loads(tuned.stdout)
    assert found["valid"] == 4 and found["target"] == targets.get(TARGET).fingerprint
    built = cli("build", *chosen, "--out", tmp_path, "--json")
    assert built.returncode == 0, built.stderr
    manifest = json.loads(Path(json.loads(built.stdout)["manifest"]).read_text())
    assert manifest["kernels"]["tuned"] == found["tuned"] == 4
    assert manifest["verification"]["passed"] and manifest["records_digest"].startswith("sha256:")
    (used,) = manifest["records"]
    assert used["kernels"] == 4 and not used["near"]
