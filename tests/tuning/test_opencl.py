"""Tuning for an OpenCL device: real measurements by its driver (PoCL), and a build that uses what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm import targets
from saevit_tvm.runtime import opencl
from saevit_tvm.tuning.store import Store
from schedules.registry import chosen_tiling

TARGET = "generic-opencl"


@pytest.mark.slow
@pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])
def test_a_build_uses_what_tuning_found(cli: Callable[..., Any], tmp_path: Path) -> None:
    """In float16, which this driver can only store: so do the candidates."""
    chosen = ["--target", TARGET, "--model", "saevit_micro", "--image-size", "32", "--dtype", "float16"]
    chosen += ["--store", str(tmp_path / "store")]
    tuned = cli("tune", *chosen, "--trials", "4", "--json")
    assert tuned.returncode == 0, tuned.stderr
    found = json.loads(tuned.stdout)
    assert found["valid"] == found["tuned"] == 4
    store = Store(tmp_path / "store", targets.get(TARGET))
    assert all(trial.machine["device"] == opencl.devices()[0].name for key in store.trials for trial in store.of(key))
    built = cli("build", *chosen, "--out", tmp_path, "--json")
    assert built.returncode == 0, built.stderr
    manifest = json.loads(Path(json.loads(built.stdout)["manifest"]).read_text())
    assert manifest["kernels"]["tuned"] == 4 and manifest["kernels"]["fallback"] == 0
    proof = manifest["verification"]
    assert proof["passed"] and 1e-5 < proof["max_rel_error"] < 5e-3
    assert manifest["inputs"][0]["dtype"] == manifest["outputs"][0]["dtype"] == "float32"
    (used,) = manifest["records"]
    assert used["kernels"] == 4 and not used["near"] and manifest["records_digest"].startswith("sha256:")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_proposal_is_a_kernel_of_its_own(dtype: str) -> None:
    """The space of a declared kernel: distinct tilings, each of which fits the device and can be replayed."""
    import tvm

    from saevit_tvm.compiler.street import TunableKernel
    from saevit_tvm.tuning import replay
    from saevit_tvm.tuning.guide import CostModel
    from saevit_tvm.tuning.space import Features, space_for
    from saevit_tvm.tuning.task import Task
    from schedules.gpu.primitives.conv import Conv
    from schedules.gpu.registry import declare
    from schedules.machines.gpus import limits_of

    target, conv = targets.get("adreno-650"), Conv(1, 14, 14, 48, 96, dtype=dtype, given=dtype)
    kernel = TunableKernel("conv", 1, tvm.IRModule({"main": declare(conv).with_attr("global_symbol", "main")}))
    task = Task(kernel, tvm.target.Target(target.tvm), lambda kernel: space_for(kernel, target))
    proposed = task.propose(16, CostModel(Features()).model)
    assert len({candidate.key for candidate in proposed}) == 16
    limits = limits_of(target.tvm)
    for candidate in proposed:
        schedule = replay.apply(replay.workload(kernel.module), candidate.trace)
        tiling = chosen_tiling(schedule.mod["main"]) if schedule else None
        assert tiling is not None and limits.excess(*conv.program(limits, conv.KNOBS(**tiling)).usage) is None
