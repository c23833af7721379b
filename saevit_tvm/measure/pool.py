"""Expendable child processes: each does one job at a time, and one that crashes or hangs is replaced.

What a job returns, or how its worker failed, is told apart from what is wrong with the machine: a worker that
cannot even start is an error of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from saevit_tvm.support.errors import TuningError

START_SECONDS = 180.0
POLL_SECONDS = 0.2
LAST_WORDS = 600


@dataclass(frozen=True)
class Failed:
    """A job that came to nothing: `how` is "failed", "crashed" or "timed out", `words` the worker's own."""

    how: str
    words: str


class Worker:
    """A child process, and the jobs it is given."""

    def __init__(self, role: str, scratch: Path, environment: dict[str, str]) -> None:
        self.role = role
        self._environment = os.environ | environment
        self._stderr = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  (lives as long as the worker)
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "saevit_tvm.measure.worker", str(theirs.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self._ready, self._started = False, time.monotonic()
        self._spoken = 0

    def ready(self, wait: float = 0.0) -> bool:
        """Whether it has started. One that cannot even start is no fault of a candidate's, but an error."""
        if self._ready:
            return True
        if self.connection.poll(wait):
            try:
                self.connection.recv()
            except (EOFError, OSError):
                self._fail()
            self._ready = True
        elif time.monotonic() > self._started + START_SECONDS:
            self._fail()
        return self._ready

    def _fail(self) -> NoReturn:
        self.kill()
        raise TuningError(f"the {self.role} worker does not start; its last words: {self.last_words()}")

    def give(self, job: str, arguments: tuple[Any, ...], seconds: float) -> None:
        while not self.ready(wait=START_SECONDS):
            pass
        self._spoken = os.fstat(self._stderr.fileno()).st_size
        self._deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # if it died idle, the answer will say so
            self.connection.send((job, arguments))

    def answer(self) -> Any | Failed | None:
        """What the job returned, or how it failed; None while it is still at it. Then it is fit for the next job."""
        if self.connection.poll():
            try:
                succeeded, value = self.connection.recv()
            except (EOFError, OSError):
                self.process.wait()
                return self._replaced("crashed")
            return value if succeeded else Failed("failed", _gist(value))
        if time.monotonic() < self._deadline:
            return None
        self.process.kill()
        self.process.wait()
        return self._replaced("timed out")

    def _replaced(self, how: str) -> Failed:
        words = self.last_words()
        self.replace()
        return Failed(how, words)

    def last_words(self) -> str:
        """What it wrote during its last job, and how it ended."""
        end = os.fstat(self._stderr.fileno()).st_size
        said = os.pread(self._stderr.fileno(), end - self._spoken, self._spoken).decode(errors="replace")
        code = self.process.poll()
        ending = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
        return "; ".join(part for part in (_gist(said), ending) if part) or "(it said nothing)"

    def replace(self) -> None:
        self.kill()
        self._start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class Pool:
    """Workers of one role, and what each is at."""

    def __init__(self, role: str, count: int, scratch: Path, environment: dict[str, str]) -> None:
        self._make = lambda: Worker(role, scratch, environment)
        self.workers = [self._make() for _ in range(count)]
        self._busy: dict[Worker, Any] = {}

    @property
    def idle(self) -> int:
        return len(self.workers) - len(self._busy)

    @property
    def ready(self) -> int:
        """Idle workers that have started: what is given to one of them begins at once."""
        return sum(worker not in self._busy and worker.ready() for worker in self.workers)

    @property
    def busy(self) -> int:
        return len(self._busy)

    @property
    def connections(self) -> list[Connection]:
        """Where something is heard when a job ends."""
        return [worker.connection for worker in self._busy]

    def grow(self, count: int) -> None:
        """Have at least so many workers."""
        self.workers += [self._make() for _ in range(count - len(self.workers))]

    def give(self, item: Any, job: str, arguments: tuple[Any, ...], seconds: float, to: Worker | None = None) -> None:
        """Have an idle worker do a job; `item` comes back with its outcome."""
        worker = to or min(
            (worker for worker in self.workers if worker not in self._busy), key=lambda one: not one.ready()
        )
        self._busy[worker] = item
        worker.give(job, arguments, seconds)

    def collect(self) -> Iterator[tuple[Worker, Any, Any | Failed]]:
        """The jobs that have ended since the last look: whose, what and how."""
        for worker in list(self._busy):
            answer = worker.answer()
            if answer is not None:
                yield worker, self._busy.pop(worker), answer

    def drop(self) -> None:
        """Forget the jobs under way."""
        for worker in self._busy:
            worker.replace()
        self._busy.clear()

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()


def _gist(text: str) -> str:
    """What a worker said, in one line and without the frames of tracebacks."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line[0].isspace()]
    return "; ".join(lines)[-LAST_WORDS:]
