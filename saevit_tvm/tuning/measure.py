"""Where candidates run: worker processes on this machine that build and time them, and what went wrong if not.

Building uses every core; then one candidate runs at a time with nothing else going on, because a kernel that
shares its cores with a compiler is measured wrong. Workers live on; one that crashes or hangs is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from saevit_tvm.errors import TuningError
from saevit_tvm.targets import Target

START_SECONDS = 180.0
BUILD_SECONDS = 30.0
RUN_SECONDS = 20.0
HOPELESS = 5.0
POLL_SECONDS = 0.2
LAST_WORDS = 600


@dataclass
class Candidate:
    """A scheduled kernel to measure."""

    key: str
    trace: list[Any]
    module_json: str
    source: Any = field(repr=False)  # MetaSchedule's own object, for the cost model


@dataclass(frozen=True)
class Result:
    """The times of a candidate, or what kind of failure it met and the worker's own last words."""

    run_secs: tuple[float, ...] = ()
    failure: str | None = None
    words: str | None = None


@dataclass(frozen=True)
class Built:
    """A compiled candidate, and the dtype and shape of each of its arguments."""

    library: Path
    arguments: list[tuple[str, list[int]]]


class Worker:
    """A child process, and the jobs it is given."""

    def __init__(self, role: str, scratch: Path, environment: dict[str, str]) -> None:
        self.role = role
        self._environment = os.environ | environment
        self._stderr = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  (lives as long as the worker)
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "saevit_tvm.tuning.worker", str(theirs.fileno()), str(os.getpid())]
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
        self._ready = False
        self._spoken = 0

    def wait_until_ready(self) -> None:
        """A worker that cannot even start is no fault of a candidate's."""
        if self._ready:
            return
        if self.connection.poll(START_SECONDS):
            try:
                self.connection.recv()
            except (EOFError, OSError):
                pass
            else:
                self._ready = True
                return
        self.kill()
        raise TuningError(f"the {self.role} worker does not start; its last words: {self.last_words()}")

    def give(self, job: str, arguments: tuple[Any, ...], seconds: float) -> None:
        self.wait_until_ready()
        self._spoken = os.fstat(self._stderr.fileno()).st_size
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # if it died idle, the answer will say so
            self.connection.send((job, arguments))

    def answer(self) -> tuple[bool, Any] | str | None:
        """What the job returned, or how the worker failed; None while it is still at it."""
        if self.connection.poll():
            try:
                return self.connection.recv()
            except (EOFError, OSError):
                self.process.wait()
                return "crashed"
        return "timed out" if time.monotonic() > self.deadline else None

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


class LocalMeasurer:
    """Builds and runs candidates on this machine."""

    def __init__(self, target: Target) -> None:
        cores = len(os.sched_getaffinity(0))
        threads = int(target.tvm.get("num-cores", cores))
        self._target = json.dumps(target.tvm)
        self._scratch = tempfile.TemporaryDirectory(prefix="saevit-tvm-tune-")
        self._count = 0
        folder = Path(self._scratch.name)
        one_thread = {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.builders = [Worker("build", folder, one_thread) for _ in range(cores)]
        self.runner = Worker("run", folder, {"TVM_NUM_THREADS": str(threads)})

    def __enter__(self) -> LocalMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self.builders, self.runner):
            worker.kill()
        self._scratch.cleanup()

    def measure(
        self, candidates: Sequence[Candidate], best: float, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Candidate, Result]]:
        """Each candidate with its result, as soon as there is one; ends early when asked to stop."""
        built: list[tuple[Candidate, Built]] = []
        for candidate, outcome in self._build(candidates, stopping):
            if isinstance(outcome, Built):
                built.append((candidate, outcome))
            else:
                yield candidate, outcome
        built.sort(key=lambda pair: candidates.index(pair[0]))  # the most promising first, not the first to compile
        for candidate, kernel in built:
            if stopping():
                return
            yield candidate, self._run(kernel, best)

    def _build(
        self, candidates: Sequence[Candidate], stopping: Callable[[], bool]
    ) -> Iterator[tuple[Candidate, Built | Result]]:
        waiting = list(candidates)
        busy: dict[int, tuple[Candidate, Path]] = {}
        while (waiting or busy) and not stopping():
            for index, worker in enumerate(self.builders):
                if waiting and index not in busy:
                    busy[index] = (waiting.pop(0), self._new_library())
                    candidate, library = busy[index]
                    worker.give("build", (candidate.module_json, self._target, str(library)), BUILD_SECONDS)
            wait([self.builders[index].connection for index in busy], POLL_SECONDS)
            for index in list(busy):
                answer = self.builders[index].answer()
                if answer is not None:
                    candidate, library = busy.pop(index)
                    outcome = _outcome(self.builders[index], answer)
                    yield candidate, outcome if isinstance(outcome, Result) else Built(library, outcome)
        for index in busy:
            self.builders[index].replace()

    def _run(self, built: Built, best: float) -> Result:
        self.runner.give("run", (str(built.library), built.arguments, HOPELESS * best), RUN_SECONDS)
        while (answer := self.runner.answer()) is None:
            wait([self.runner.connection], POLL_SECONDS)
        outcome = _outcome(self.runner, answer)
        return outcome if isinstance(outcome, Result) else Result(run_secs=tuple(outcome))

    def _new_library(self) -> Path:
        self._count += 1
        return Path(self._scratch.name) / f"candidate-{self._count}.so"


def _gist(text: str) -> str:
    """What a worker said, in one line and without the frames of tracebacks."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line[0].isspace()]
    return "; ".join(lines)[-LAST_WORDS:]


def _outcome(worker: Worker, answer: tuple[bool, Any] | str) -> Any:
    """What the job returned, or a Result that says how it failed; the worker is fit for the next job after it."""
    if isinstance(answer, tuple):
        succeeded, value = answer
        return value if succeeded else Result(failure=f"{worker.role} failed", words=_gist(value))
    if answer == "timed out":
        worker.process.kill()
        worker.process.wait()
    words = worker.last_words()
    worker.replace()
    return Result(failure=f"{worker.role} {answer}", words=words)
