"""Two artifacts beside each other: who goes first, what the ratios are of, and when answers are the same."""

from __future__ import annotations

import numpy as np
import pytest

from saevit_tvm.verbs import counted as emulated
from saevit_tvm.verbs import pair


@pytest.fixture
def clock(monkeypatch):
    """Processes that take what they are told to; who was started, and with how many answers to give."""
    times = {"a": iter([1.0, 3.0, 9.0]), "b": iter([2.0, 2.0, 10.0])}
    started: list[tuple[str, int]] = []

    def measure(side, example, threads, share, seconds, work):
        started.append((side.folder.name, share))
        middle = next(times[side.folder.name])
        side.times.append([middle / 2, middle, middle * 100])
        side.first_ms.append(middle)
        side.answer = [np.zeros(3, np.float32)]

    monkeypatch.setattr(pair, "_measure", measure)
    return started


def test_neither_always_goes_first_and_neighbours_are_compared(micro_artifact, clock):
    paths = (micro_artifact, micro_artifact)
    result = pair.pair(paths, pairs=3, threads=1, runs=7, seconds=0.0, say=lambda _line: None)
    assert [name for name, _ in clock] == ["a", "b", "b", "a", "a", "b"]
    assert [share for _, share in clock] == [2, 2, 2, 2, 3, 3]
    assert result["ratios"] == [0.5, 1.5, 0.9] and result["ratio"] == 0.9
    assert result["ratio_p10"] == pytest.approx(0.58) and result["ratio_p90"] == pytest.approx(1.38)
    assert [row["first_ms"] for row in result["artifacts"]] == [3.0, 2.0]
    assert [row["runs"] for row in result["artifacts"]] == [9, 9]


def test_the_same_bit_for_bit_or_how_far_apart():
    some, other = np.float32([1.0, 0.0]), np.float32([1.5, 0.0])
    nan = np.float32([np.nan, 0.0])
    assert pair._difference([some, nan], [some, nan]) == {"equal": True, "max_abs_difference": 0.0}
    assert pair._difference([some, some], [some, other]) == {"equal": False, "max_abs_difference": 0.5}
    assert pair._difference([some], [np.float32([1.0, -0.0])]) == {"equal": False, "max_abs_difference": 0.0}
    assert pair._difference([other, nan], [some, some]) == {"equal": False, "max_abs_difference": None}


def test_the_ratios_of_what_was_counted(micro_artifact, monkeypatch):
    counted = iter(
        {"kind": "a model", "instructions": count, "launches": 4, "float_ops": 0, "seconds": 1} for count in (3, 4)
    )
    monkeypatch.setattr(emulated, "emulated", lambda path, say: next(counted))
    result = pair.emulated_pair((micro_artifact, micro_artifact), lambda _line: None)
    assert result["ratios"] == {"instructions": 0.75, "launches": 1, "float_ops": None}
    assert [row["instructions"] for row in result["artifacts"]] == [3, 4] and result["kind"] == "a model"
