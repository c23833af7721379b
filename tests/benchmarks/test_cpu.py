"""The comparison: what it keeps, what it skips, what its table says, what a failure costs, and the ablation."""

from __future__ import annotations

import json
import shutil

import pytest

TOLD = {
    "core_round_trip_ns": [50.0, 60.0, 900.0],
    "results": [
        {
            "name": "saevit-tvm",
            "version": "0.1.0",
            "dtype": "float32",
            "threads": 2,
            "median_ms": 8.0,
            "p10_ms": 7.5,
            "p90_ms": 9.25,
            "ratio": 1.0,
            "first_ms": 200.0,
            "size": 25_000_000,
            "max_abs_error": 3e-6,
        }
    ],
    "failed": [{"name": "ncnn", "threads": 2, "error": "its process crashed (SIGSEGV)"}],
}


@pytest.fixture
def cpu(script):
    return script("cpu")


def test_a_row_says_all_that_makes_it_comparable(cpu):
    table = cpu.comparison_table(cpu.rows_of("saevit_xs", "1x224", TOLD)).splitlines()
    head, _, ours, failed = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert len(head) == len(ours) == len(failed)
    told = dict(zip(head, ours, strict=True))
    assert told["runtime"] == "saevit-tvm 0.1.0" and told["arithmetic"] == "float32" and told["threads"] == "2"
    assert told["round trip ns"] == "60" and told["median ms"] == "8.00"
    assert (told["p10"], told["p90"]) == ("7.50", "9.25")
    assert told["ours / its"] == "1.00" and told["max error"] == "3.0e-06" and told["MB"] == "25.0"
    assert failed[4:6] == ["ncnn", "not measured: its process crashed (SIGSEGV)"]


def test_only_what_was_measured_is_not_measured_again(cpu):
    rows = cpu.rows_of("saevit_xs", "1x224", TOLD)
    assert cpu.outstanding(rows, "saevit_xs", "1x224", [1, 2]) == [1]
    assert cpu.outstanding(rows, "saevit_s", "1x224", [1, 2]) == [1, 2]
    failed = [{"model": "saevit_xs", "scenario": "1x224", "threads": 1, "name": "saevit-tvm", "error": "no room"}]
    assert cpu.outstanding(failed, "saevit_xs", "1x224", [1]) == [1]


def test_results_are_written_whole(cpu, tmp_path):
    rows = cpu.rows_of("saevit_xs", "1x224", TOLD)
    cpu.write(tmp_path / "cpu", rows, cpu.comparison_table)

    def fails(_rows):
        raise KeyError("p50_ms")

    with pytest.raises(KeyError):
        cpu.write(tmp_path / "cpu", rows, fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]
    assert json.loads((tmp_path / "cpu.json").read_text()) == rows


@pytest.mark.slow
def test_a_model_that_fails_costs_its_own_rows(short, run, tmp_path):
    """Beside one that was measured before."""
    before = json.loads((short("cpu")[1] / "cpu.json").read_text())
    shutil.copy(short("cpu")[1] / "cpu.json", tmp_path)
    done = run("cpu.py", "--short", "--models", "saevit_nano,saevit_micro", "--resume")
    assert done.returncode == 1
    rows = json.loads((tmp_path / "cpu.json").read_text())
    (failed,) = (row for row in rows if row not in before)
    assert "saevit_nano" in failed["error"] and len(rows) == len(before) + 1


@pytest.mark.slow
def test_every_stage_of_the_ablation_computes_the_model(run, tmp_path):
    options = ("--models", "saevit_micro", "--image-size", "32", "--seconds", "0.1", "--threads", "2")
    done = run("cpu.py", "--ablation", *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["threads"] for row in rows] == [2] * 5
    assert all(row["max_abs_error"] < 2e-5 and row["median_ms"] > 0 for row in rows)
    assert rows[0]["stage"] == "plain TVM" and rows[-1]["stage"].startswith("+ tuned")
