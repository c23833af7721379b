"""The measurer of this machine.

Building uses every core; then one candidate runs at a time with nothing else going on, because a kernel that
shares its cores with a compiler is measured wrong.
"""

from __future__ import annotations

import hashlib
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from saevit_tvm import backends
from saevit_tvm.measure.candidates import HOPELESS, Builders, Built, Candidate, Pair, Result, failure
from saevit_tvm.measure.pool import POLL_SECONDS, Failed, Pool
from saevit_tvm.support.cpu import cores
from saevit_tvm.targets import Target

RUN_SECONDS = 20.0
DRIVER_SECONDS = 60.0  # more, where the driver compiles a kernel when it is first run


class LocalMeasurer:
    """Builds and runs candidates on this machine."""

    kind = "local"

    def __init__(self, target: Target, builders: int | None = None) -> None:
        self.machine, self._kind = this_machine(target.kind), target.kind
        backend = backends.get(target.kind)
        backend.prepare()
        self._seconds = RUN_SECONDS + (DRIVER_SECONDS if backend.driver_compiles else 0)
        self._scratch = tempfile.TemporaryDirectory(prefix="saevit-tvm-tune-")
        folder = Path(self._scratch.name)
        self.builders = Builders(target, folder, builders or cores())
        self._runners = Pool("run", 1, folder, {"TVM_NUM_THREADS": str(target.threads or cores())})
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
        self._runners.give(None, "run", arguments, self._seconds)
        while not (ended := list(self._runners.collect())):
            wait(self._runners.connections, POLL_SECONDS)
        ((_, _, outcome),) = ended
        return failure("run", outcome) if isinstance(outcome, Failed) else Result(run_secs=tuple(outcome))


@cache
def this_machine(kind: str) -> dict[str, Any]:
    """What measured: comparable, and tellable apart when stores are merged, but without the machine's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    cpu = found.group(1) if found else platform.machine()
    name = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    names = backends.get(kind).names()
    return {"id": name, "cpu": cpu, "cores": cores()} | ({"device": names[0]} if names else {})
