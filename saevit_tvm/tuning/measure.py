"""Candidates, their results, and the measurer of this machine.

Building uses every core; then one candidate runs at a time with nothing else going on, because a kernel that
shares its cores with a compiler is measured wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from saevit_tvm.runtime import cuda
from saevit_tvm.runtime.opencl import devices, plugin
from saevit_tvm.targets import Target, toolchain
from saevit_tvm.tuning.pool import POLL_SECONDS, Failed, Pool

BUILD_SECONDS = 30.0
RUN_SECONDS = 20.0
DRIVER_SECONDS = 60.0  # more, where the driver compiles a kernel when it is first run
HOPELESS = 5.0


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


Pair = tuple[Candidate, Result]


class Builders:
    """Compiles candidates for a target, which need not be this machine's, on as many cores as are given."""

    def __init__(self, target: Target, scratch: Path, count: int) -> None:
        self._target, self._linker = json.dumps(target.tvm), linker_command(target)
        self._scratch, self._made = scratch, 0
        self.pool = Pool("build", count, scratch, {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})

    def give(self, candidate: Candidate) -> None:
        self._made += 1
        library = self._scratch / f"candidate-{self._made}.so"
        arguments = candidate.module_json, self._target, str(library), self._linker
        self.pool.give((candidate, library), "build", arguments, BUILD_SECONDS)

    def collect(self) -> Iterator[tuple[Candidate, Built | Result]]:
        """The candidates that are built by now, or why they are not."""
        for _, (candidate, library), outcome in self.pool.collect():
            if isinstance(outcome, Failed):
                yield candidate, failure("build", outcome)
            else:
                yield candidate, Built(library, outcome)

    def build(
        self, candidates: Sequence[Candidate], stopping: Callable[[], bool]
    ) -> Iterator[tuple[Candidate, Built | Result]]:
        """All of them, each as soon as it is built; ends early when asked to stop."""
        waiting = list(candidates)
        while (waiting or self.pool.busy) and not stopping():
            while waiting and self.pool.idle:
                self.give(waiting.pop(0))
            wait(self.pool.connections, POLL_SECONDS)
            yield from self.collect()
        self.pool.drop()


class LocalMeasurer:
    """Builds and runs candidates on this machine."""

    kind = "local"

    def __init__(self, target: Target, builders: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        threads = int(target.tvm.get("num-cores", cores))
        self.machine, self._kind = this_machine(target.kind), target.kind
        if target.kind == "opencl":
            plugin.library()  # compiled before any candidate's time runs
        self._scratch = tempfile.TemporaryDirectory(prefix="saevit-tvm-tune-")
        folder = Path(self._scratch.name)
        self.builders = Builders(target, folder, builders or cores)
        self._runners = Pool("run", 1, folder, {"TVM_NUM_THREADS": str(threads)})
        (self.runner,) = self._runners.workers

    def __enter__(self) -> LocalMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.builders.pool.kill()
        self._runners.kill()
        self._scratch.cleanup()

    def measure(self, candidates: Sequence[Candidate], best: float, stopping: Callable[[], bool]) -> Iterator[Pair]:
        """Each candidate with its result, as soon as there is one; ends early when asked to stop."""
        built: list[tuple[Candidate, Built]] = []
        for candidate, outcome in self.builders.build(candidates, stopping):
            if isinstance(outcome, Built):
                built.append((candidate, outcome))
            else:
                yield candidate, outcome
        built.sort(key=lambda pair: candidates.index(pair[0]))  # the most promising first, not the first to compile
        for candidate, kernel in built:
            if stopping():
                return
            yield candidate, self._run(kernel, best)

    def _run(self, built: Built, best: float) -> Result:
        arguments = str(built.library), built.arguments, self._kind, HOPELESS * best
        seconds = RUN_SECONDS + (DRIVER_SECONDS if self._kind == "opencl" else 0)
        self._runners.give(None, "run", arguments, seconds)
        while not (ended := list(self._runners.collect())):
            wait(self._runners.connections, POLL_SECONDS)
        ((_, _, outcome),) = ended
        return failure("run", outcome) if isinstance(outcome, Failed) else Result(run_secs=tuple(outcome))


def linker_command(target: Target) -> list[str]:
    """The C compiler that links for a target, and what it must be told."""
    chosen = toolchain.linker(target)
    return [*chosen.cc_argv, *chosen.link_flags]


def failure(stage: str, failed: Failed) -> Result:
    """The result of a candidate that failed at "build" or "run"."""
    return Result(failure=f"{stage} {failed.how}", words=failed.words)


@cache
def this_machine(kind: str = "llvm") -> dict[str, Any]:
    """What measured: comparable, and tellable apart when stores are merged, but without the machine's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    cpu = found.group(1) if found else platform.machine()
    name = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    names = [device.name for device in devices()] if kind == "opencl" else []
    names += [device.name for device in cuda.devices()] if kind == "cuda" else []
    return {"id": name, "cpu": cpu, "cores": len(os.sched_getaffinity(0))} | ({"device": names[0]} if names else {})
