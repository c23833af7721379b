"""Every script's short form: run as CI and anyone else can, it leaves the results that the long one would."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm import backends, targets
from saevit_tvm.support.errors import TargetError
from saevit_tvm.tuning import bundle

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = "saevit-tvm"

Short = Callable[[str], Any]


# What each leaves -----------------------------------------------------


def arm64(out: Path, _printed: str) -> None:
    rows = read(out / "arm64.json")
    assert [row["name"] for row in rows] == [OURS, f"{OURS}, static program", "ncnn"]
    assert all(row["fma"] > 0 and row["max_abs_error"] < 2e-5 for row in rows)
    assert rows[2]["ratio"] == rows[0]["instructions"] / rows[2]["instructions"]


def cpu(out: Path, printed: str) -> None:
    rows = {row["name"]: row for row in read(out / "cpu.json")}
    assert rows[OURS]["max_abs_error"] < 2e-5 and rows["torch"]["median_ms"] > 0
    assert "one picture at a time" in rows["ncnn"]["error"]
    assert printed.strip() == (out / "cpu.md").read_text().strip()
    assert not list(out.glob("*.part"))


def gpu_slot(out: Path, printed: str) -> None:
    (card,) = (path for path in (out / "results").iterdir() if path.is_dir())
    rows = [json.loads(line) for line in (card / "results.jsonl").read_text().splitlines()]
    told: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        told.setdefault((row["order"]["do"], row["order"].get("contender") or row["order"]["name"]), []).append(row)
    assert [row["deviation"] < 1e-5 for row in told["check", OURS]] == [True]
    for contender in (OURS, "torch"):
        assert [row["order"]["turn"] for row in told["turn", contender]] == [1, 2, 3]
        assert all(row["median_ms"] > 0 for row in told["turn", contender])
    assert [row["error"] for row in told["turn", "torch-graph"]] == ["CUDA graphs need CUDA"]  # asked once
    assert {name for do, name in told if do == "limit"} >= {"copy", "float32"}
    assert "| saevit_micro | 1 | float32 | saevit-tvm |" in printed and (card / "results.md").read_text() in printed
    assert json.loads((card / "machine.json").read_text())["torch"]
    found = bundle.read_results(card / "candidates-0.jsonl")
    assert len(found.results) == 2 and all(record["run_secs"] for record, _ in found.results)


def kernels(out: Path, printed: str) -> None:
    rows = read(out / "kernels.json")
    blocks = [f"{name}{stage}" for stage in range(1, 5) for name in ("dwsconv", "saa", "ciffn")]
    convs = [f"conv{i}" for i in range(1, 6)]  # two of the stem, and one before each later stage
    assert sorted(row["kernel"] for row in rows if row["model"] == "saevit_micro") == sorted([*convs, *blocks, "head"])
    assert all(row["error"] < 1e-5 and row["share"] > 0 for row in rows)
    table = (out / "kernels.md").read_text()
    assert printed.endswith(table) and len(printed.splitlines()) == len(rows) + 2 + len(table.splitlines())
    (attention, *_), (*_, total) = (
        [line for line in table.splitlines() if word in line] for word in ("attention", "all")
    )
    assert attention.startswith("| attention | 1 |") and total.startswith(f"| all | 2 | {len(rows)} | 100.0 % |")


def mobile(out: Path, printed: str) -> None:
    (row,) = read(out / "mobile.json")
    assert row["gpu"] == "mali-g610" and row["launches"] == sum(row["kinds"].values()) > 0
    assert f"| saevit_micro | {OURS} for mali-g610 | float32 | {row['launches']} |" in printed


def sdk(out: Path, printed: str) -> None:
    told = (out / "sdk.md").read_text()
    assert told in printed and re.search(r"^\| saevit_micro \| 1 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", told, re.MULTILINE)
    assert re.findall(r"^100 inferences, (\w+): \d+ pages", told, re.MULTILINE) == ["static", "shared"]
    assert re.findall(r"^(\w+).c: Done \d+ runs", told, re.MULTILINE) == ["fuzz_artifact", "fuzz_image"]


def sizes(out: Path, _printed: str) -> None:
    *ours, ncnn = read(out / "sizes.json")
    static, bare, shared = (row["program"] for row in ours)
    assert {row["name"] for row in ours} == {OURS} and bare < static < shared
    assert ncnn["name"].startswith("ncnn ") and ncnn["program"] > shared and ncnn["weights"] > 8e5


def tuning(out: Path, printed: str) -> None:
    result = read(out / "tuning.json")
    # How far either comes in so little time depends on the machine; that it is told does not.
    assert 0 <= result["ours"]["valid"] <= result["ours"]["trials"] == result["ours"]["curve"][-1][1]
    assert result["stock"]["ended"] == "the time is up"
    for name in ("ours", "stock"):
        assert [dot["fraction"] for dot in result[name]["measured"]] == result["fractions"]
        assert all(dot["max_abs_error"] < 2e-5 for dot in result[name]["measured"])
    assert all(rate > 0 for rate in result["build_throughput"].values())
    assert OURS in (out / "tuning.md").read_text() and (out / "tuning.md").read_text() in printed


def zoo(out: Path, printed: str) -> None:
    rows = read(out / "zoo.json")
    assert len(rows) == 8 and not [row["error"] for row in rows if "error" in row]
    assert all(0 < row["max_rel_error"] < 1e-4 and row["proof"] == "host" for row in rows)
    assert all(row["multiply_adds"] > 0 and 0 <= row["left_multiply_adds"] <= row["left_time"] < 1 for row in rows)
    assert "| resnet18 | plain | 1x3x64x64 |" in printed and (out / "zoo.md").read_text().strip() == printed.strip()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# What each needs beyond a C compiler ----------------------------------


def emulator() -> str | None:
    """Why arm64 software cannot be fetched and compared here."""
    if backends.how_to_run(targets.get("rpi4")) != "qemu":
        return "needs qemu-user and a cross compiler, and no ARM machine"
    lacking = [name for name in ("ncnn", "pnnx") if importlib.util.find_spec(name) is None]
    return f"needs {lacking[0]}" if lacking else None


def debian() -> str | None:
    return emulator() if shutil.which("apt-get") and shutil.which("dpkg-deb") else "needs Debian's packages"


def backbones() -> str | None:
    return None if importlib.util.find_spec("timm") else "needs timm: pip install --no-deps timm"


def linker() -> str | None:
    try:
        backends.require(targets.get("mali-g610"))
    except TargetError as error:
        return str(error)
    return None


# The script's name: what its results must be, and why it cannot run here.
SCRIPTS: dict[str, tuple[Callable[[Path, str], None], Callable[[], str | None]]] = {
    "arm64": (arm64, debian),
    "cpu": (cpu, lambda: None),
    "gpu_slot": (gpu_slot, lambda: None),
    "kernels": (kernels, backbones),
    "mobile": (mobile, linker),
    "sdk": (sdk, lambda: None),
    "sizes": (sizes, emulator),
    "tuning": (tuning, lambda: None),
    "zoo": (zoo, backbones),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_short_form(short: Short, name: str) -> None:
    expected, lacking = SCRIPTS[name]
    if reason := lacking():
        pytest.skip(reason)
    done, out = short(name)
    assert done.returncode == 0, done.stderr
    expected(out, done.stdout)


def test_every_script_has_one() -> None:
    """What cannot be started is no script, but what they share."""
    files = {path.stem: path.read_text() for path in BENCHMARKS.glob("*.py")}
    assert {name for name, text in files.items() if 'if __name__ == "__main__"' in text} == set(SCRIPTS)


def test_it_stands_for_options_and_keeps_no_results(script, monkeypatch, tmp_path) -> None:
    parsed = script("command_line").parsed

    def given(*line: str) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["script", *line])
        parser = argparse.ArgumentParser()
        parser.add_argument("--models", default="saevit_xs")
        parser.add_argument("--seconds", type=float, default=20.0)
        return parsed(parser, "--models saevit_micro --seconds 0.1")

    assert (given().models, given().seconds, given().out) == ("saevit_xs", 20.0, BENCHMARKS / "results")
    options = given("--short", "--seconds", "3")
    assert (options.models, options.seconds) == ("saevit_micro", 3.0)
    assert BENCHMARKS not in options.out.parents and not list(options.out.iterdir())
    assert given("--short", "--out", str(tmp_path / "new")).out == tmp_path / "new" and (tmp_path / "new").is_dir()


def test_a_stand_in_is_not_taken_for_what_it_stands_for(script, monkeypatch) -> None:
    """Where this process has it on its path, too, those that it starts need it all the same."""
    stand_in = script("command_line").stand_in
    needed = stand_in()
    monkeypatch.setattr(sys, "path", [*sys.path, *needed])
    importlib.invalidate_caches()
    assert stand_in() == needed


# What comes after -----------------------------------------------------


@pytest.mark.slow
def test_a_comparison_that_is_done_has_nothing_left_to_do(short: Short, run) -> None:
    _, out = short("cpu")
    before = read(out / "cpu.json")
    again = run("cpu.py", "--short", "--resume", out=str(out))
    assert again.returncode == 0 and "compiling" not in again.stderr
    assert read(out / "cpu.json") == before
