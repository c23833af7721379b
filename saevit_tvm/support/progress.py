"""What is being done at the moment, for a person who waits: whoever shows it, watches."""

from __future__ import annotations

from collections.abc import Callable

_watchers: list[Callable[[str], None]] = []


def watch(watcher: Callable[[str], None]) -> None:
    """Have it told from now on, and nobody else."""
    _watchers[:] = [watcher]


def now(what: str) -> None:
    for watcher in _watchers:
        watcher(what)
