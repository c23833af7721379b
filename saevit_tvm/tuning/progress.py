"""What a search shows while it runs: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from saevit_tvm.tuning.session import Snapshot

EVERY_SECONDS = 10.0

Show = Callable[[Snapshot], None]


def line(snapshot: Snapshot) -> str:
    """The state of a search in one line."""
    budget = f"/{snapshot.limit}" if snapshot.limit is not None else ""
    what = "modelled" if snapshot.modelled else "predicted"
    parts = [
        f"trials {snapshot.trials}{budget}",
        f"kernels {snapshot.tuned}/{snapshot.tasks}",
        f"{what} {snapshot.best_ms:.3f} ms" if snapshot.best_ms is not None else f"{what} -",
    ]
    if snapshot.seconds_left is not None:
        parts.append(f"{_duration(snapshot.seconds_left)} left")
    parts += [f"{kind} {count}" for kind, count in snapshot.failures.most_common()]
    if snapshot.ended:
        return ", ".join([*parts, snapshot.ended])
    return ", ".join([*parts, f"now {snapshot.current}"] if snapshot.current else parts)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def plain(say: Callable[[str], None]) -> Show:
    """Lines, not too many, and always the last."""
    last = float("-inf")

    def show(snapshot: Snapshot) -> None:
        nonlocal last
        now = time.monotonic()
        if snapshot.ended or now - last >= EVERY_SECONDS:
            last = now
            say(line(snapshot))

    return show


@contextmanager
def live(stream: TextIO) -> Iterator[Show]:
    """One line on a terminal that is always up to date; it begins with the first state and ends with the last."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    shown = Live(console=Console(file=stream), refresh_per_second=4)

    def show(snapshot: Snapshot) -> None:
        shown.start()
        shown.update(Text(line(snapshot)), refresh=bool(snapshot.ended))
        if snapshot.ended:
            shown.stop()

    try:
        yield show
    finally:
        shown.stop()
