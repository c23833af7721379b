"""Candidates measured on the nodes of a Ray cluster: one actor a node, which builds and times as on one machine.

Ray keeps the nodes, moves the work and notices when a node is lost; what was in flight there goes to another.
`local:N` starts a cluster of N nodes here. They share this machine's cores, so its times are for trying things out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from saevit_tvm import backends, targets
from saevit_tvm.measure.candidates import Candidate, Pair, Result
from saevit_tvm.measure.local import LocalMeasurer, this_machine
from saevit_tvm.support.errors import TuningError
from saevit_tvm.targets import Target

START_SECONDS = 180.0  # for a node to be ready
STOP_SECONDS = 30.0
PATIENCE_SECONDS = 300.0  # without any node
LOOK_SECONDS = 5.0  # between two looks for new nodes
POLL_SECONDS = 0.2
MOST_AT_A_TIME = 8  # candidates to a node: a stop waits for them
LOCAL_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

Say = Callable[[str], None]
Outcome = tuple[tuple[float, ...], str | None, str | None]  # the fields of a Result


def open_cluster(target: Target, nodes: str | None, address: str | None, say: Say) -> ClusterMeasurer:
    """Connect to a running cluster, or start one of so many nodes on this machine."""
    if importlib.util.find_spec("ray") is None:
        raise TuningError("--cluster needs Ray, which is not installed: pip install 'saevit-tvm[cluster]'.")
    os.environ.update(QUIET)
    local = LocalCluster(int(nodes)) if nodes else None
    try:
        return ClusterMeasurer(target, local.address if local else str(address), say, local)
    except BaseException:
        if local:
            local.stop()
        raise


# On a node ------------------------------------------------------------


class Station:
    """The actor: this package's measurer of one machine."""

    def __init__(self, target: Target, builders: int) -> None:
        self._target, self._builders = target, builders
        self._measurer: LocalMeasurer | None = None

    def unfit(self, versions: dict[str, str]) -> str | None:
        """Why this node must not measure, or None."""
        for package, version in _versions().items():
            if version != versions[package]:
                return f"has {package} {version}, and {versions[package]} is searching"
        here, threads = targets.native(), self._target.threads or 1
        same = self._target.name != "native" or here.cut_for(threads).fingerprint == self._target.fingerprint
        if not same or here.tvm["num-cores"] < threads:
            return f"is {here.fingerprint}"
        works, reason = backends.runs_here(self._target)
        return None if works else reason

    def machine(self) -> dict[str, Any]:
        return this_machine(self._target.kind)

    def measure(self, modules: list[str], best: float) -> list[Outcome]:
        if self._measurer is None:
            self._measurer = LocalMeasurer(self._target, self._builders)
        candidates = [Candidate(str(index), [], module, None) for index, module in enumerate(modules)]
        results = {pair[0].key: pair[1] for pair in self._measurer.measure(candidates, best, lambda: False)}
        ordered = [results[candidate.key] for candidate in candidates]
        return [(result.run_secs, result.failure, result.words) for result in ordered]


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in ("saevit-tvm", "apache-tvm", "apache-tvm-ffi")}


# Where the search runs ------------------------------------------------


class ClusterMeasurer:
    """Spreads candidates over the nodes, as many at a time to each as it can compile."""

    kind = "cluster"

    def __init__(self, target: Target, address: str, say: Say, local: LocalCluster | None = None) -> None:
        self._target, self._say, self._local = target, say, local
        self._ray = _connected(address)
        self._actors: dict[str, Any] = {}  # by node
        self._sizes: dict[str, int] = {}
        self._refused: set[str] = set()
        self._looked = 0.0
        self._alone_since: float | None = None
        try:
            self.machine = self._first_look()
        except BaseException:
            self._ray.shutdown()
            raise

    def __enter__(self) -> ClusterMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(self._actors):
            self._forget(node)
        self._ray.shutdown()
        if self._local:
            self._local.stop()

    def measure(self, candidates: Sequence[Candidate], best: float, stopping: Callable[[], bool]) -> Iterator[Pair]:
        """Each candidate with its result; asked to stop, it waits for those that are on a node."""
        waiting = list(candidates)
        flying: dict[Any, tuple[str, list[Candidate]]] = {}
        while flying or (waiting and not stopping()):
            if not stopping():
                self._send(waiting, flying, best)
            done, _ = self._ray.wait(list(flying), timeout=POLL_SECONDS)
            for ref in done:
                node, share = flying.pop(ref)
                results = self._fetched(ref, node)
                if results is None:
                    waiting[:0] = share
                else:
                    yield from zip(share, results, strict=True)

    def _send(self, waiting: list[Candidate], flying: dict[Any, tuple[str, list[Candidate]]], best: float) -> None:
        """Give every idle node its share of what waits."""
        self._look()
        self._mind_being_alone()
        busy = {node for node, _ in flying.values()}
        idle = self._actors.keys() - busy
        fair = -(-len(waiting) // max(1, len(idle)))
        for node in idle:
            size = min(fair, self._sizes[node])
            share, waiting[:] = waiting[:size], waiting[size:]
            if share:
                modules = [candidate.module_json for candidate in share]
                flying[self._actors[node].measure.remote(modules, best)] = node, share

    def _fetched(self, ref: Any, node: str) -> list[Result] | None:
        """The results of a share, or None if its node is lost."""
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError

        try:
            return [Result(*outcome) for outcome in self._ray.get(ref)]
        except (RayActorError, ObjectLostError, NodeDiedError):
            self._forget(node)
            self._say(f"a node of the cluster was lost; going on with {len(self._actors)}")
            return None

    # Nodes ------------------------------------------------------------

    def _first_look(self) -> dict[str, Any]:
        """Engage every node that there is; all must be fit for the target."""
        self._engage(strict=True)
        if not self._actors:
            raise TuningError("the Ray cluster has no node with a CPU to measure on: start one with 'ray start'.")
        machine = self._ray.get(next(iter(self._actors.values())).machine.remote(), timeout=START_SECONDS)
        return machine | {"nodes": len(self._actors)}

    def _look(self) -> None:
        """Engage nodes that have joined since."""
        if time.monotonic() > self._looked + LOOK_SECONDS:
            self._engage(strict=False)

    def _engage(self, *, strict: bool) -> None:
        self._looked = time.monotonic()
        for node, cpus in self._nodes().items():
            if node in self._actors or node in self._refused:
                continue
            actor = self._station(node, cpus)
            reason = self._objection(actor)
            if reason is None:
                self._actors[node], self._sizes[node] = actor, min(cpus, MOST_AT_A_TIME)
                continue
            self._ray.kill(actor)
            self._refused.add(node)
            words = f"a node of the cluster cannot measure for target '{self._target.fingerprint}': it {reason}"
            if strict:
                raise TuningError(f"{words}; use nodes that are alike, or another --target.")
            self._say(f"{words}; going on without it")

    def _nodes(self) -> dict[str, int]:
        """The living nodes and their CPUs."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        cpus = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in alive}
        return {node: count for node, count in cpus.items() if count}

    def _station(self, node: str, cpus: int) -> Any:
        """An actor that has a node for itself: a measurement wants no company."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        return self._ray.remote(Station).options(num_cpus=cpus, scheduling_strategy=strategy).remote(self._target, cpus)

    def _objection(self, actor: Any) -> str | None:
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return self._ray.get(actor.unfit.remote(_versions()), timeout=START_SECONDS)
        except GetTimeoutError:
            return f"was not ready within {START_SECONDS:.0f} s (are its CPUs in use?)"
        except RayError as error:
            return f"cannot run saevit-tvm ({str(error).splitlines()[-1].strip()})"

    def _mind_being_alone(self) -> None:
        """All nodes are lost: others may join, within reason."""
        if self._actors:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
            self._say("waiting: the cluster has no node left")
        elif time.monotonic() > self._alone_since + PATIENCE_SECONDS:
            raise TuningError(f"gave up after {PATIENCE_SECONDS / 60:.0f} minutes without a node of the cluster.")
        else:
            time.sleep(POLL_SECONDS)

    def _forget(self, node: str) -> None:
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.kill(self._actors[node])
        del self._actors[node], self._sizes[node]


def _connected(address: str) -> Any:
    """Ray, connected and quiet. Its own handling of SIGTERM would end the search without a word."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            "auto" if address == "ray:auto" else address,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, OSError, RuntimeError, ValueError, ImportError) as error:
        words = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise TuningError(f"no Ray cluster answers at '{address}' ({words[0].rstrip('.')}): start one.") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    return ray


# A cluster on this machine ----------------------------------------------


class LocalCluster:
    """Ray's own nodes, in the care of a child process: it ends with us, and they with it."""

    def __init__(self, nodes: int) -> None:
        # In /tmp: Ray puts sockets there, whose paths must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="saevit-ray-", dir="/tmp", ignore_cleanup_errors=True)
        command = [sys.executable, "-m", "saevit_tvm.tuning.cluster", str(nodes), self._folder.name]
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            start_new_session=True,  # Ctrl-C is for us to handle
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            self.stop()
            self._words.seek(0)
            words = self._words.read().decode(errors="replace").strip().splitlines() or ["it gave no reason"]
            raise TuningError(f"Ray does not start here: {words[-1]}")

    def stop(self) -> None:
        try:
            self.process.communicate(timeout=STOP_SECONDS)  # closes its stdin, which ends it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self._folder.cleanup()


def _main(nodes: int, folder: str) -> None:
    os.environ.update(QUIET | {"RAY_TMPDIR": folder})
    Path(folder, "ray").mkdir()  # which Ray makes only under its default name
    from ray.cluster_utils import Cluster

    head = LOCAL_NODE | {"include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(nodes - 1):
        cluster.add_node(**LOCAL_NODE)
    print(cluster.address, flush=True)
    sys.stdin.read()  # which ends when the search does, in whatever way
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
