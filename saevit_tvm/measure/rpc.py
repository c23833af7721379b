"""Candidates measured on boards and phones, through TVM's RPC tracker: as many at a time as there are devices.

A device is not to be trusted: it drops out, hangs, reboots, and belongs to others too. A candidate whose device
is lost is measured on another, and only one that has lost device after device is blamed for it. Whatever touches
a device does so in a worker process that can be killed, so no silent socket can stop the search.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from saevit_tvm.measure.candidates import HOPELESS, Builders, Built, Candidate, Pair, Result, failure
from saevit_tvm.measure.pool import POLL_SECONDS, Failed, Pool, Worker
from saevit_tvm.measure.tracker import Queue, Request, Tracker, TrackerError
from saevit_tvm.measure.worker import KERNEL_CRASHED
from saevit_tvm.support.cpu import cores
from saevit_tvm.support.errors import TuningError
from saevit_tvm.targets import Target

REACH_SECONDS = 15.0  # to connect and to upload
RUN_SECONDS = 30.0  # after which a server ends the session by itself
GRACE_SECONDS = 10.0  # for a server to do so and say it
ATTEMPTS = 3  # devices that a candidate may lose while it runs
PATIENCE_SECONDS = 300.0  # without any device that works
BUSY_PATIENCE_SECONDS = 3600.0  # while others use all of them
LOOK_SECONDS = 5.0  # between two looks at the tracker
PAUSE_SECONDS = 1.0  # after a device has failed
MOST_DEVICES = 16


@dataclass
class Attempt:
    """A built candidate on its way to a device, and the devices it has lost."""

    candidate: Candidate
    built: Built
    running: bool = False
    lost: int = 0


class RpcMeasurer:
    """Builds candidates here and runs them on the devices that a tracker knows by a key."""

    kind = "rpc"

    def __init__(
        self, target: Target, host: str, port: int, key: str, *, say: Callable[[str], None] = lambda _line: None
    ) -> None:
        self._tracker, self._key, self._say = Tracker(host, port), key, say
        self._kind = target.kind
        devices = self._tracker.require(key).servers
        self.machine = _machine(target, self._tracker.name, key)
        self._scratch = tempfile.TemporaryDirectory(prefix="saevit-tvm-tune-")
        folder = Path(self._scratch.name)
        self.builders = Builders(target, folder, cores())
        self.runners = Pool("device", min(devices, MOST_DEVICES), folder, {"TVM_NUM_THREADS": "1"})
        self._ready: list[Attempt] = []
        self._requests: list[Request] = []
        self._outage = _Outage()

    def __enter__(self) -> RpcMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up_requests()
        self.builders.pool.kill()
        self.runners.kill()
        self._scratch.cleanup()

    def measure(self, candidates: Sequence[Candidate], best: float, stopping: Callable[[], bool]) -> Iterator[Pair]:
        """Each candidate with its result, as soon as there is one; asked to stop, it finishes those on devices."""
        waiting, builders = list(candidates), self.builders.pool
        self._ready.clear()
        self._outage.over()
        self._hire()
        try:
            while self.runners.busy or (not stopping() and (waiting or builders.busy or self._ready)):
                while waiting and builders.idle and not stopping():
                    self.builders.give(waiting.pop(0))
                self._queue_for_devices(stopping())
                heard: list[Any] = [*builders.connections, *self.runners.connections, *self._requests]
                wait(heard, POLL_SECONDS)
                for candidate, outcome in self.builders.collect():
                    if isinstance(outcome, Result):
                        yield candidate, outcome
                    else:
                        self._ready.append(Attempt(candidate, outcome))
                self._take_devices()
                yield from self._results(HOPELESS * best)
        finally:
            self._give_up_requests()
            builders.drop()
            self.runners.drop()

    # Devices ------------------------------------------------------------

    def _hire(self) -> Queue:
        """See to it that there is a worker for each device that has joined."""
        try:
            queue = self._tracker.queues().get(self._key)
        except TrackerError as error:
            self._trouble(str(error))
            queue = None
        if queue is not None:
            self.runners.grow(min(queue.servers, MOST_DEVICES))
        return queue or Queue(0, 0, 0)

    def _queue_for_devices(self, stopping: bool) -> None:
        """Have one place in the tracker's queue for each candidate that could run now."""
        if stopping:
            self._give_up_requests()
        wanted = 0 if stopping or self._outage.pausing else min(len(self._ready), self.runners.ready)
        try:
            while len(self._requests) < wanted:
                self._requests.append(self._tracker.request(self._key))
            if not wanted or self.runners.busy:
                self._outage.rest()
            elif self._outage.time_to_look:
                self._look()
        except TrackerError as error:
            self._trouble(str(error))

    def _take_devices(self) -> None:
        """Send a candidate to each device that the tracker has lent us."""
        for request in list(self._requests):
            try:
                device = request.granted()
            except TrackerError as error:
                self._trouble(str(error))
                device = None
            else:
                if device is None:
                    continue
            self._requests.remove(request)
            request.close()
            if device is not None:
                attempt = self._ready.pop(0)
                attempt.running = False
                seconds = REACH_SECONDS + RUN_SECONDS
                arguments = device.host, device.port, device.match_key, str(attempt.built.library), seconds
                self.runners.give(attempt, "reach", arguments, REACH_SECONDS)

    def _give_up_requests(self) -> None:
        for request in self._requests:
            request.close()
        self._requests.clear()

    # Results ------------------------------------------------------------

    def _results(self, hopeless: float) -> Iterator[Pair]:
        """What the devices have found out since the last look."""
        for worker, attempt, outcome in self.runners.collect():
            if not attempt.running and outcome is True:
                self._run(worker, attempt, hopeless)
                continue
            result = self._judged(attempt, outcome)
            if result is None:
                self._ready.insert(0, attempt)
            else:
                attempt.built.library.unlink(missing_ok=True)
                yield attempt.candidate, result

    def _run(self, worker: Worker, attempt: Attempt, hopeless: float) -> None:
        attempt.running = True
        arguments = str(attempt.built.library), attempt.built.arguments, self._kind, hopeless
        seconds = REACH_SECONDS + RUN_SECONDS + GRACE_SECONDS
        self.runners.give(attempt, "run_remotely", arguments, seconds, to=worker)

    def _judged(self, attempt: Attempt, outcome: Any | Failed) -> Result | None:
        """The candidate's result, or None if it was the device that failed."""
        if not isinstance(outcome, Failed):
            self._outage.over()
            return Result(run_secs=tuple(outcome))
        if attempt.running and outcome.how == "failed":  # the device itself says so
            self._outage.over()
            return failure("run", _as_told(outcome))
        self._trouble(f"a device with the key '{self._key}' was lost: {outcome.words}")
        attempt.lost += attempt.running
        if attempt.lost < ATTEMPTS:
            return None
        return Result(failure="device lost", words=f"{attempt.lost} devices were lost running it: {outcome.words}")

    # Trouble ------------------------------------------------------------

    def _trouble(self, words: str) -> None:
        """A device or the tracker has failed: say so once, and give up when that goes on for too long."""
        if self._outage.begins(words):
            self._say(f"{words}; going on with what answers")
        self._mind(PATIENCE_SECONDS, self._outage.words)

    def _look(self) -> None:
        """Why is there no device? Say so when that changes, and give up in the end."""
        queue = self._hire()
        if queue.servers and self._outage.words is None:
            words = f"every device with the key '{self._key}' is in use, {queue.servers} in all"
            self._mind(BUSY_PATIENCE_SECONDS, words)
        else:
            words = f"the tracker has no device with the key '{self._key}' that works"
            self._mind(PATIENCE_SECONDS, words)
        if self._outage.changes(words):
            self._say(f"waiting: {words}")

    def _mind(self, limit: float, words: str | None) -> None:
        if self._outage.seconds > limit:
            raise TuningError(f"gave up after {limit / 60:.0f} minutes without a device: {words}.")


class _Outage:
    """Since when nothing was heard of any device, and what is known about it."""

    def __init__(self) -> None:
        self.over()

    def over(self) -> None:
        self._since = self._looked = time.monotonic()
        self._pause_until = 0.0
        self._said: str | None = None
        self.words: str | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    @property
    def pausing(self) -> bool:
        return time.monotonic() < self._pause_until

    def rest(self) -> None:
        """Nothing is waiting for a device."""
        self._looked = time.monotonic()

    @property
    def time_to_look(self) -> bool:
        due = time.monotonic() > self._looked + LOOK_SECONDS
        if due:
            self._looked = time.monotonic()
        return due

    def begins(self, words: str) -> bool:
        """Note trouble; whether it is news."""
        first = self.words is None
        self.words = words
        self._pause_until = time.monotonic() + PAUSE_SECONDS
        return first

    def changes(self, words: str) -> bool:
        before, self._said = self._said, words
        return before != words


def _as_told(failed: Failed) -> Failed:
    """How the candidate failed, by the words of a server that has seen it."""
    if KERNEL_CRASHED in failed.words:
        return Failed("crashed", failed.words)
    return Failed("timed out", failed.words) if "RPCSessionTimeoutError" in failed.words else failed


def _machine(target: Target, tracker: str, key: str) -> dict[str, Any]:
    name = hashlib.sha256(f"{tracker}/{key}".encode()).hexdigest()[:8]
    cpu = target.tvm.get("mcpu", target.arch)
    return {"id": name, "cpu": cpu, "cores": target.threads or 0, "device": key}
