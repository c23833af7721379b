"""Tuning on an NVIDIA GPU, behind the driver of emulators/cuda_driver, under which kernels do nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saevit_tvm import targets
from saevit_tvm.tuning.store import Store

TARGET = "cuda-sm_90"


@pytest.mark.slow
def test_candidates_are_built_and_timed_beside_a_driver(fake_gpu: dict[str, str], tmp_path: Path) -> None:
    """TVM would compile kernels in its own way there; times are those of replayed graphs."""
    line = ["tune", "--target", TARGET, "--model", "saevit_micro", "--image-size", "32", "--trials", "2"]
    command = [sys.executable, "-m", "saevit_tvm", *line, "--store", str(tmp_path / "store"), "--json"]
    calls = tmp_path / "calls"
    told = os.environ | fake_gpu | {"CALLS": str(calls)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=told)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["valid"], found["failed"]) == (2, 0)
    store = Store(tmp_path / "store", targets.get(TARGET))
    trials = [trial for key in store.trials for trial in store.of(key)]
    assert all("NVIDIA" in trial.machine["device"] and len(trial.run_secs) > 1 for trial in trials)
    assert "captured" in calls.read_text() and "graph" in calls.read_text()
