"""Boards on this machine: a real tracker and real servers on loopback, which tests may kill."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saevit_tvm.measure.tracker import Queue, Tracker

HERE = "127.0.0.1"
STOP = 2


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server((HERE, 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def started(command: list[str | Path], **options) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the test, and all that it has started."""
    log = subprocess.DEVNULL
    with subprocess.Popen([*map(str, command)], stdout=log, stderr=log, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def tracking() -> Iterator[Tracker]:
    """TVM's own tracker, in a thread."""
    from tvm.rpc.tracker import PopenTrackerServerState

    port = free_port()
    state = PopenTrackerServerState(HERE, port, port + 1, silent=True)
    try:
        yield Tracker(HERE, port)
    finally:
        Tracker(HERE, port)._opened([STOP, state.stop_key]).close()
        state.thread.join(10)


def queue(tracker: Tracker, key: str) -> Queue:
    return tracker.queues().get(key, Queue(0, 0, 0))


@contextmanager
def serving(command: list[str | Path], tracker: Tracker, key: str) -> Iterator[subprocess.Popen[str]]:
    """A board with this key, from the moment the tracker knows it."""
    before = queue(tracker, key).servers
    environment = os.environ | {"TVM_NUM_THREADS": "1"}
    line = [*command, "--port", "0", "--tracker", f"{HERE}:{tracker.port}", "--key", key]
    with started(line, env=environment) as process:
        until(lambda: queue(tracker, key).servers > before)
        yield process
