"""Where candidates run, by the words of `--measure` and `--cluster`: this machine, boards, an emulator, a cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from saevit_tvm.measure.candidates import BUILD_SECONDS, Candidate, Result
from saevit_tvm.measure.local import DRIVER_SECONDS, RUN_SECONDS, LocalMeasurer
from saevit_tvm.measure.tracker import rpc_address
from saevit_tvm.support.errors import UsageError
from saevit_tvm.targets import Target

Say = Callable[[str], None]
Opener = Callable[[Target, Say], "Measurer"]

_CLUSTER = re.compile(r"local:(?P<nodes>[1-9]\d?)|(?P<address>ray://[^\s/:]+:\d{1,5}|ray:auto)")


class Measurer(Protocol):
    """Builds candidates and finds out how fast they are. `machine` is what a trial says of where that was."""

    @property
    def kind(self) -> str:
        """One of "local", "rpc", "qemu" and "cluster"."""

    @property
    def machine(self) -> dict[str, Any]: ...

    def __enter__(self) -> Measurer: ...

    def __exit__(self, *_: object) -> None: ...

    def measure(
        self, candidates: Sequence[Candidate], best: float, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Candidate, Result]]:
        """Each candidate with its result, as soon as there is one; ends early when asked to stop.

        `best` is the time to beat: a candidate that is hopelessly slower need not be measured well.
        """


def open_measurer(where: str, target: Target, *, cluster: str | None = None, say: Say = lambda _line: None) -> Measurer:
    """What `where` and `cluster` stand for, ready to measure for `target`; `say` gets lines for the user."""
    return parse(where, cluster)(target, say)


def parse(where: str, cluster: str | None = None) -> Opener:
    """How to open what `where` and `cluster` stand for; wrong syntax is found before anything is started."""
    if cluster is not None:
        if where != "local":
            raise UsageError(f"--cluster measures on the cluster's own nodes: leave out --measure {where}.")
        return _cluster(cluster)
    if where == "local":
        return lambda target, _say: LocalMeasurer(target)
    if where == "qemu":
        return _emulated
    return _rpc(where)


def longest_seconds(where: str, cluster: str | None = None) -> float:
    """What the measurements under way may take at most, for which a stop waits."""
    if cluster is not None:
        from saevit_tvm.tuning.cluster import MOST_AT_A_TIME

        return BUILD_SECONDS + MOST_AT_A_TIME * RUN_SECONDS
    if where == "local":
        return RUN_SECONDS + DRIVER_SECONDS
    if where == "qemu":
        from saevit_tvm.measure import counted

        return counted.RUNS * counted.RUN_SECONDS
    from saevit_tvm.measure import rpc

    return rpc.REACH_SECONDS + rpc.RUN_SECONDS + rpc.GRACE_SECONDS


def _emulated(target: Target, _say: Say) -> Measurer:
    from saevit_tvm.measure.counted import EmulatedMeasurer

    return EmulatedMeasurer(target)


def _rpc(where: str) -> Opener:
    if not where.startswith("rpc:"):
        raise UsageError(f"--measure '{where}' is not understood: give local, qemu or rpc://HOST:PORT/KEY.")
    host, port, key = rpc_address(where)

    def opened(target: Target, say: Say) -> Measurer:
        from saevit_tvm.measure.rpc import RpcMeasurer

        return RpcMeasurer(target, host, port, key, say=say)

    return opened


def _cluster(text: str) -> Opener:
    found = _CLUSTER.fullmatch(text)
    if found is None:
        raise UsageError(f"--cluster '{text}' is not understood: give local:N, ray:auto or ray://HOST:PORT.")

    def opened(target: Target, say: Say) -> Measurer:
        from saevit_tvm.tuning.cluster import open_cluster

        return open_cluster(target, found["nodes"], found["address"], say)

    return opened
