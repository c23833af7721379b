"""Candidates and their results, and the processes that compile candidates on every core."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from saevit_tvm.measure.pool import POLL_SECONDS, Failed, Pool
from saevit_tvm.support import toolchain
from saevit_tvm.targets import Target

BUILD_SECONDS = 30.0
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


def linker_command(target: Target) -> list[str]:
    """The C compiler that links for a target, and what it must be told."""
    chosen = toolchain.linker(target)
    return [*chosen.cc_argv, *chosen.link_flags]


def failure(stage: str, failed: Failed) -> Result:
    """The result of a candidate that failed at "build" or "run"."""
    return Result(failure=f"{stage} {failed.how}", words=failed.words)
