"""The comparison on a GPU, without one: what is packed, in which order it is measured, what damage costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm.backends import nvrtc
from schedules.gpu.launch import OVERLAPPING

MICRO = ("--models", "saevit_micro", "--image-size", "32", "--batches")


@pytest.fixture
def packed(run: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """What `prepare` makes, unpacked."""

    def make(*arguments: str) -> Path:
        done = run("cuda.py", "prepare", *arguments, out="there.tar")
        assert done.returncode == 0, done.stderr
        assert "there: tar xf there.tar && python3 there/bench.py measure" in done.stdout
        with tarfile.open(tmp_path / "there.tar") as tar:
            tar.extractall(tmp_path)
        return tmp_path / "there"

    return make


@pytest.mark.slow
@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
def test_what_overlapping_launches_are_worth_can_be_measured(packed: Callable[..., Path]) -> None:
    folder = packed("--target", "cuda-sm_90", *MICRO, "1", "--dtypes", "float32")
    artifacts = json.loads((folder / "manifest.json").read_text())["artifacts"]
    overlapping = {
        each["contender"]: (folder / each["file"]).read_bytes().count(OVERLAPPING.encode()) for each in artifacts
    }
    assert overlapping == {"saevit-tvm": artifacts[0]["launches"], "saevit-tvm-in-turn": 0}


def test_damaged_results_and_a_full_disk_are_no_traceback(packed_script: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "benchmarks" / "cuda.py", tmp_path / "bench.py")
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "llvm", "models": {}, "artifacts": []}))
    step = {"contender": "limits"}
    rows = [{"step": {**step, "limit": name}, "rate": 3.0, "unit": "GB/s"} for name in ("copy", "tf32")]
    lines = [json.dumps(rows[0]), '{"step": {"con', "17", json.dumps(rows[1])]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    told = packed_script(tmp_path, "table")
    assert told.returncode == 0 and told.stdout.startswith("Reached here: copy 3 GB/s, tf32 3 GB/s.\n"), told.stderr
    line = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, str(tmp_path / "bench.py"), "table"]
    full = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert full.returncode == 1 and full.stderr == "bench.py: File too large (results)\n"


def test_the_most_important_comes_first(script: Callable[[str], Any]) -> None:
    steps = script("cuda").steps
    built = {"contender": "saevit-tvm", "dtype": "float16"}
    artifacts = [{**built, "model": m, "batch": b} for m in ("xs", "s") for b in (1, 8, 64)]
    manifest = {"kind": "cuda", "models": {"xs": {}, "s": {}}, "artifacts": artifacts}
    found = [tuple(step.values()) for step in steps(manifest)]
    assert len(found) == len(set(found)) and found[0] == ("limits", "copy")
    at = {step: index for index, step in enumerate(found)}
    ours = [step[1:3] for step in found if step[0] == "saevit-tvm"]
    assert ours == [("xs", 1), ("xs", 64), ("xs", 8), ("s", 1), ("s", 64), ("s", 8)]
    assert (
        at["torch", "s", 8, "tf32"]
        < at["torch-compile", "xs", 1, "float16"]
        < at["torch-compile-max", "xs", 1, "float16"]
    )
    assert ("saevit-tvm", "xs", 1, "tf32") not in at and ("torch", "xs", 1, "tf32") in at
