"""The two searches side by side: what is read off their curves, and what is kept of a run that was stopped."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def tuning(script):
    return script("tuning")


def record(workload: int, *run_secs: float) -> str:
    return json.dumps([workload, [[[], []], list(run_secs), {}, []]])


def test_a_prediction_needs_a_time_of_every_kernel(tuning):
    lines = [record(0, 0.004, 0.002), record(1, 1e10), record(1, 0.001), record(0, 0.002), record(1, 0.005)]
    marks = [(0.5, 0), (10.0, 2), (20.0, 3), (30.0, 5)]
    curve, kernels, valid = tuning.stock_curve(marks, lines, {0: 2, 1: 5})
    assert (kernels, valid) == (2, 4)
    assert [point.predicted_ms for point in curve] == [None, None, pytest.approx(11.0), pytest.approx(9.0)]
    assert [point.trials for point in curve] == [0, 2, 3, 5]
    # A kernel that never reached the database keeps the prediction open.
    assert tuning.stock_curve(marks, lines, {0: 2, 1: 5, -1: 1})[0][-1].predicted_ms is None


def test_what_is_read_off_a_curve(tuning):
    curve = [(1.0, 0, None), (10.0, 20, 30.0), (15.0, 30, 10.6), (20.0, 40, 10.4), (40.0, 80, 10.0)]
    told = tuning.described([tuning.Point(*point) for point in curve])
    assert told["trials"] == 80 and told["trials_a_second"] == 2.0 and told["predicted_ms"] == 10.0
    assert told["seconds_to_first_prediction"] == 10.0 and told["seconds_to_within_5_percent"] == 20.0
    nothing = tuning.described([tuning.Point(60.0, 12, None)])
    assert nothing["predicted_ms"] is None and nothing["seconds_to_within_5_percent"] is None
    assert tuning.described([])["trials_a_second"] == 0.0


ASKED = {"model": "m", "input_shape": [1, 3, 32, 32], "minutes": 1.0, "fractions": [1.0], "target": "t"}


def test_what_is_known_is_told_and_kept_wherever_a_run_was_stopped(tuning, tmp_path, capsys):
    results = tuning.Results(tmp_path, dict(ASKED), resume=False)
    results.tell()
    assert list(tmp_path.iterdir()) == [], "nothing is known yet"
    found = tuning.described([tuning.Point(30.0, 20, 2.0)]) | {"kernels": 3, "valid": 19, "guided": 12, "ended": "x"}
    results.keep(ours=found)
    results.tell()
    assert "| saevit-tvm | 3 | 20 | 19 | 12 |" in (tmp_path / "tuning.md").read_text()
    assert "not yet" in capsys.readouterr().out
    assert tuning.Results(tmp_path, dict(ASKED), resume=True).known["ours"]["trials"] == 20
    with pytest.raises(SystemExit, match="another comparison"):
        tuning.Results(tmp_path, ASKED | {"minutes": 2.0}, resume=True)
    results.work.mkdir()
    assert "ours" not in tuning.Results(tmp_path, dict(ASKED), resume=False).known
    assert not results.work.exists(), "a new comparison starts from nothing"
