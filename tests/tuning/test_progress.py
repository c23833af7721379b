"""What a search shows: on a real terminal, and in a pipe."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter

from saevit_tvm.tuning.progress import line, live, plain
from saevit_tvm.tuning.session import Snapshot

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
STATES = [
    Snapshot(tasks=5, limit=40, current="conv2d"),
    Snapshot(tasks=5, tuned=2, trials=9, limit=40, failures=Counter({"run crashed": 2}), seconds_left=61.2),
    Snapshot(tasks=5, tuned=5, trials=40, limit=40, best_ms=1.25, ended="the trials are spent"),
]


def read_all(terminal: int) -> str:
    os.set_blocking(terminal, False)
    chunks = []
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 65536):
            chunks.append(chunk)
    os.close(terminal)
    return b"".join(chunks).decode()


def test_a_pipe_gets_the_first_and_the_last_state_as_lines() -> None:
    lines: list[str] = []
    show = plain(lines.append)
    for state in STATES:
        show(state)
    assert lines == [
        "trials 0/40, kernels 0/5, predicted -, now conv2d",
        "trials 40/40, kernels 5/5, predicted 1.250 ms, the trials are spent",
    ]


def test_a_line_names_failures_and_the_time_left() -> None:
    assert line(STATES[1]) == "trials 9/40, kernels 2/5, predicted -, 61 s left, run crashed 2"


def test_a_long_time_is_told_in_minutes() -> None:
    assert "20 min left" in line(Snapshot(tasks=1, seconds_left=1201.0))


def test_a_terminal_keeps_the_last_state() -> None:
    terminal, side = os.openpty()
    with os.fdopen(side, "w") as stream:
        with live(stream) as show:
            for state in STATES:
                show(state)
        stream.flush()
        shown = read_all(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "trials 40/40, kernels 5/5, predicted 1.250 ms" in text
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1


def test_a_search_that_is_broken_off_gives_the_cursor_back() -> None:
    terminal, side = os.openpty()
    with os.fdopen(side, "w") as stream:
        with contextlib.suppress(KeyboardInterrupt), live(stream) as show:
            show(STATES[0])
            raise KeyboardInterrupt
        stream.flush()
        shown = read_all(terminal)
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 1
