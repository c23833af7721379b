"""A quarter of an hour on a GPU, rehearsed: what is packed, in which order, what a deadline and damage cost."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm import targets
from saevit_tvm.backends import nvrtc
from saevit_tvm.emulators import cuda as emulated
from saevit_tvm.runtime import cuda
from schedules.gpu.launch import OVERLAPPING

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = "saevit-tvm"
lacking = nvrtc.missing() or emulated.missing()
needs_stand_in = pytest.mark.skipif(lacking is not None, reason=lacking or "")


@pytest.fixture
def rehearsed(short: Callable[[str], Any], packed_script: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Runs `measure` on what the short form packed, behind its stand-in for a GPU."""
    _, out = short("gpu_slot")
    shutil.copytree(out / "short", tmp_path / "short")
    gpu = emulated.environment_of(out / "stand-in", "sm_90", out / "stand-in")

    def run(*args: Any, **environment: str) -> Any:
        folder = tmp_path / "short"
        return packed_script(folder, "measure", "--rehearsal", "--results", tmp_path, *args, **gpu, **environment)

    return run


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob("*/results.jsonl") for line in path.read_text().splitlines()]


def named(row: dict[str, Any]) -> tuple[Any, ...]:
    order = row["order"]
    return order["do"], order.get("contender") or order["name"], order.get("turn")


@needs_stand_in
@pytest.mark.slow
def test_what_overlapping_launches_are_worth_can_be_measured(short: Callable[[str], Any]) -> None:
    folder = short("gpu_slot")[1] / "short"
    artifacts = json.loads((folder / "manifest.json").read_text())["artifacts"]
    overlapping = {
        each["contender"]: (folder / each["file"]).read_bytes().count(OVERLAPPING.encode()) for each in artifacts
    }
    assert overlapping == {OURS: artifacts[0]["launches"], "saevit-tvm-in-turn": 0}


@needs_stand_in
@pytest.mark.slow
def test_a_deadline_in_the_middle_costs_one_step(rehearsed: Callable[..., Any], tmp_path: Path) -> None:
    asked = ("--contenders", f"{OURS},torch")
    done = rehearsed("--seconds", 6, *asked)  # PyTorch's turns alone take five, besides what it takes to start
    assert done.returncode == 0 and "the time is up" in done.stderr, done.stderr
    before = rows_in(tmp_path)
    for results in tmp_path.glob("*/results.jsonl"):
        with results.open("a") as file:
            file.write('{"order": {"do')  # what a kill leaves
    done = rehearsed(*asked)
    assert done.returncode == 0 and "everything is measured" in done.stderr, done.stderr
    after = rows_in(tmp_path)
    assert after[: len(before)] == before and len(after) > len(before)
    assert [named(row) for row in after if row["order"].get("contender") == "torch"] == [
        ("turn", "torch", turn) for turn in (1, 2, 3)
    ]
    assert not [row for row in after if "error" in row]


@needs_stand_in
@pytest.mark.slow
def test_a_device_that_is_lost_costs_ours_and_nobody_else(rehearsed: Callable[..., Any], tmp_path: Path) -> None:
    done = rehearsed("--contenders", f"{OURS},torch", FAIL="cuLaunchKernelEx 719 20")
    assert done.returncode == 0, done.stderr
    rows = {named(row): row for row in rows_in(tmp_path)}
    assert "error" in rows["check", OURS, None] and "error" in rows["turn", OURS, 1]
    assert ("turn", OURS, 2) not in rows and rows["turn", "torch", 3]["median_ms"] > 0
    assert "Of 2 artifacts that were checked 0 are right." in done.stdout


@needs_stand_in
@pytest.mark.slow
def test_what_is_wrong_is_one_sentence(
    rehearsed: Callable[..., Any], packed_script: Callable[..., Any], tmp_path: Path
) -> None:
    mistyped = rehearsed("--contenders", "saevit")
    assert mistyped.returncode == 2
    assert "there is no saevit; there are saevit-tvm, saevit-tvm-in-turn, torch" in mistyped.stderr
    if not cuda.available()[0]:
        alone = packed_script(tmp_path / "short", "measure")
        assert alone.returncode == 1 and len(alone.stderr.strip().splitlines()) == 1, alone.stderr
        assert "there is no NVIDIA GPU here" in alone.stderr
    library = tmp_path / "short/saevit_micro-b1-float32.so"
    library.write_bytes(library.read_bytes()[:-1])
    assert rehearsed("--contenders", OURS, "--seconds", 30).returncode == 0
    rows = {named(row): row for row in rows_in(tmp_path)}
    assert all("is damaged" in rows[key]["error"] for key in (("check", OURS, None), ("turn", OURS, 1)))


@pytest.mark.slow
def test_damaged_results_and_a_full_disk_are_no_traceback(
    packed_script: Callable[..., Any], script: Callable[[str], Any], tmp_path: Path
) -> None:
    for name in ("gpu_slot.py", "gpu_slot_measure.py", "gpu_slot_contenders.py"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    manifest = {"kind": "llvm", "models": {}, "artifacts": []}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    order = {"do": "limit"}
    rows = [{"order": {**order, "name": name}, "rate": 3.0, "unit": "GB/s"} for name in ("copy", "tf32")]
    lines = [json.dumps(rows[0]), '{"order": {"do', "17", '{"order": 3}', json.dumps(rows[1])]
    of = script("gpu_slot_measure").digest
    for name in (f"card-{of(manifest)}", f"card-{of({**manifest, 'seed': 1})}"):  # the other is of another archive
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("\n".join(lines) + "\n")
    told = packed_script(tmp_path, "table")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("Reached here: copy 3 GB/s, tf32 3 GB/s.\n") == 1
    nothing = packed_script(tmp_path, "table", "--results", tmp_path / "nowhere")
    assert nothing.returncode == 1 and "there are no results" in nothing.stderr
    line = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, str(BENCHMARKS / "gpu_slot.py")]
    line += ["prepare", "--target", "native", "--out", str(tmp_path / "full.tar")]
    full = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert full.returncode == 1 and "File too large" in full.stderr.splitlines()[-1], full.stderr
    assert "Traceback" not in full.stderr and not list(tmp_path.glob("full*"))


def test_the_most_important_comes_first(script: Callable[[str], Any]) -> None:
    slot = script("gpu_slot")
    found = slot.ordered(["xs", "s"], [1, 64, 256, 8], ["float16", "float32"])
    assert found[:4] == [("xs", 1, "float16"), ("xs", 64, "float16"), ("xs", 1, "float32"), ("s", 1, "float16")]
    assert found[4:6] == [("s", 64, "float16"), ("xs", 256, "float16")]
    assert len(found) == len(set(found)) == 16 and found[-1] == ("s", 8, "float32")
    assert slot.ordered(["xs"], [3], ["float32"]) == [("xs", 3, "float32")]


def test_what_there_is_no_time_or_no_room_for_is_left_out(script: Callable[[str], Any], tmp_path: Path) -> None:
    slot = script("gpu_slot")
    options = argparse.Namespace(minutes=10.0, mib=40.0, image_size=32)
    with slot.Archive(tmp_path / "a.tar.xz") as archive:
        made = slot.Preparation(options, targets.native(), tmp_path, archive)
        assert made._fits()
        made._longest = 600.0
        assert not made._fits()
        made._longest, made._largest = 0.0, 41.0
        assert not made._fits()
    options.minutes = 0.0
    with slot.Archive(tmp_path / "b.tar.xz") as archive:
        assert not slot.Preparation(options, targets.native(), tmp_path, archive)._fits()


def test_groups_are_compared_once_though_there_are_two_of_ours(script: Callable[[str], Any]) -> None:
    group = {"model": "xs", "batch": 1, "dtype": "float16"}
    artifacts = [{**group, "contender": OURS}, {**group, "contender": "saevit-tvm-in-turn"}]
    other = {**group, "batch": 64}
    measured = script("gpu_slot_measure")
    assert measured.groups({"artifacts": [*artifacts, {**other, "contender": OURS}]}) == [group, other]
    assert measured._slug("NVIDIA H200 (NVL)") == "nvidia-h200-nvl"
