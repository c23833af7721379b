"""Tuning for a board that is not there: candidates run under an emulator, and what they execute stands for a time.

The cost is a model and no time. It is the sum of the instructions that the busiest thread of a kernel executes,
each class with a weight, and a price for every parallel loop. Such costs are kept apart from real times, and a
build prefers any real time to them. What the model does not know: caches, pipelines, how instructions overlap.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import wait as listen
from pathlib import Path
from typing import Any

from saevit_tvm.emulators import qemu
from saevit_tvm.measure.candidates import Builders, Built, Candidate, Pair, Result
from saevit_tvm.measure.pool import POLL_SECONDS
from saevit_tvm.support import process
from saevit_tvm.support.cpu import cores
from saevit_tvm.support.errors import TargetError
from saevit_tvm.targets import Target
from schedules.dtypes import dlpack
from schedules.machines.cpus import threads_of

# Nanoseconds an instruction, about those of a Cortex-A72 at 1.8 GHz that is never kept waiting: a vector operation
# and a load or store each cycle, two or three of anything else. A parallel loop costs what waking threads does.
WEIGHTS = {"fma": 0.55, "vector": 0.55, "sve": 0.55, "load": 0.55, "store": 0.55, "scalar": 0.2, "branch": 0.3}
LAUNCH = 3000.0
VERSION = 1  # of the model: costs of different versions cannot be compared

RUN_SECONDS = 60.0
RUNS = 2  # of each candidate


class EmulatedMeasurer:
    """Builds candidates for a foreign CPU and counts what they execute, as many at a time as there are cores.

    Counting is not disturbed by what else the machine does, so nothing has to wait for its turn.
    """

    kind = "qemu"

    def __init__(self, target: Target, say: Callable[[str], None] = lambda _line: None) -> None:
        if target.emulator is None:
            raise TargetError(f"target '{target.name}' is not one that is emulated: leave out --measure qemu.")
        lacking = qemu.missing(target.arch)
        if lacking:
            raise TargetError(f"candidates for '{target.name}' cannot be emulated here: {lacking}.")
        qemu.counter()  # what has to be compiled first is compiled now, not by all threads at once
        self._host = qemu.kernel_host(target.arch)
        self._target = target
        self._threads = threads_of(target.tvm)
        cpu = f"qemu's {target.emulator}, modelled (instruction weights, version {VERSION})"
        self.machine: dict[str, Any] = {"id": "model", "cpu": cpu, "cores": self._threads}
        self._scratch = tempfile.TemporaryDirectory(prefix="saevit-tvm-tune-")
        self._builders = Builders(target, Path(self._scratch.name), cores())
        self._counters = ThreadPoolExecutor(cores())

    def __enter__(self) -> EmulatedMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        self._counters.shutdown(cancel_futures=True)
        self._builders.pool.kill()
        self._scratch.cleanup()

    def measure(self, candidates: Sequence[Candidate], best: float, stopping: Callable[[], bool]) -> Iterator[Pair]:
        """Each candidate with its cost, as soon as there is one; ends early when asked to stop."""
        waiting, pool = list(candidates), self._builders.pool
        counting: dict[Future[Result], Candidate] = {}
        while counting or ((waiting or pool.busy) and not stopping()):
            while waiting and pool.idle and not stopping():
                self._builders.give(waiting.pop(0))
            for candidate, outcome in self._builders.collect():
                if isinstance(outcome, Built):
                    counting[self._counters.submit(self._cost, outcome)] = candidate
                else:
                    yield candidate, outcome
            if not counting:
                listen(pool.connections, POLL_SECONDS)
            for done in wait(counting, POLL_SECONDS, FIRST_COMPLETED).done:
                yield counting.pop(done), done.result()
        pool.drop()

    def _cost(self, built: Built) -> Result:
        """The difference of a run with two calls and one with one: loading the kernel cancels out."""
        try:
            once, _ = self._count(built, 1)
            twice, launches = self._count(built, 2)
        except subprocess.TimeoutExpired:
            return Result(failure="run timed out", words=f"not done after {RUN_SECONDS:.0f} s under qemu")
        except _Failed as error:
            return Result(failure=error.kind, words=error.words)
        finally:
            built.library.unlink(missing_ok=True)
        nanoseconds = sum(weight * (twice[name] - once[name]) for name, weight in WEIGHTS.items())
        return Result(run_secs=(1e-9 * (nanoseconds + LAUNCH * launches),))

    def _count(self, built: Built, calls: int) -> tuple[dict[str, int], int]:
        counts = built.library.with_suffix(f".{calls}.json")
        arch, cpu = self._target.arch, self._target.emulator
        program = [str(self._host), str(built.library), str(calls), str(self._threads)]
        line = qemu.command(arch, cpu, [*program, *map(_described, built.arguments)], count=counts)
        done = process.run_apart(line, timeout=RUN_SECONDS)
        if done.returncode:
            raise _Failed(done)
        if not counts.exists():
            raise TargetError("qemu's plugin counted nothing: use qemu 5.2 to 8.2, with plugins enabled.")
        return json.loads(counts.read_text()), int(done.stdout)


class _Failed(Exception):
    """A kernel that did not run to its end, and its last words."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        killed = process.killed_by(done.returncode)
        self.kind = "run crashed" if killed else "run failed"
        words = [f"killed by {killed}"] if killed else []
        self.words = "; ".join([*done.stderr.strip().splitlines()[-1:], *words])


def _described(argument: tuple[str, list[int]]) -> str:
    """An argument in the words of kernel.c: "float32" of 1x8 is 2.32:1,8."""
    dtype, shape = argument
    code, bits = dlpack(dtype)
    return f"{code}.{bits}:{','.join(map(str, shape))}"
