"""bench: the artifact beside other runtimes, the same float32 model on the same number of threads.

Every runtime has a process of its own and they take turns: exactly one computes at any time, all are asked
equally often, and what the machine does meanwhile happens to all of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.errors import ModelError, UsageError
from saevit_tvm.runtime.artifact import check_runnable, read_manifest
from saevit_tvm.verbs import parity, peers, workspace
from saevit_tvm.verbs.peers.process import PeerError, PeerProcess
from saevit_tvm.verbs.roundtrip import RoundTrip
from saevit_tvm.verbs.verify import reference

ROUNDS = 10
WARM_UP = 5
SETTLE = 0.25  # seconds; idle thread pools spin for a while before they sleep


@dataclass
class Runtime:
    """One runtime in this comparison."""

    peer: peers.Peer
    folder: Path
    process: PeerProcess | None = None
    error: str | None = None
    size: int = 0
    first_ms: float = 0.0
    max_abs_error: float | None = None
    times: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self) -> Any:
        """A failure of a runtime is its row in the table, not the end."""
        try:
            yield
        except PeerError as error:
            self.error = str(error)


def bench(
    path: Path,
    *,
    threads: int | None,
    against: Sequence[str] | None,
    runs: int | None,
    seconds: float,
    weights: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure; `against=None` means PyTorch and every other runtime that is installed."""
    cores = len(os.sched_getaffinity(0))
    threads = cores if threads is None else threads
    if not 1 <= threads <= cores:
        raise UsageError(f"--threads {threads} is impossible: this process may use {cores} cores.")
    named = [peers.get(name) for name in dict.fromkeys(against or [])]
    manifest = read_manifest(path)
    check_runnable(manifest, path)
    with workspace.scratch() as scratch, contextlib.ExitStack() as processes:
        runtimes = [_runtime(peer, scratch) for peer in (peers.OURS, *_choose(named, against is None))]
        shutil.copy(path, runtimes[0].folder / "artifact.so")
        example, expected, note = _prepare(manifest, weights, runtimes, named, scratch, say)
        trip = RoundTrip(scratch)
        for runtime in runtimes:
            if runtime.error is None:
                with runtime.step():
                    _start(runtime, threads, example, scratch, expected, processes, say)
        _take_turns(runtimes, runs, seconds, trip if threads > 1 else None, say)
    return _result(path, manifest, threads, runtimes, trip, note)


# Preparing ----------------------------------------------------------


def _choose(named: list[peers.Peer], by_default: bool) -> list[peers.Peer]:
    if not by_default:
        return [peer for peer in named if peer is not peers.OURS]
    return [peer for peer in peers.PEERS if not peer.missing()]


def _runtime(peer: peers.Peer, scratch: Path) -> Runtime:
    runtime = Runtime(peer, scratch / peer.name)
    runtime.folder.mkdir()
    if peer.missing():
        runtime.error = f"not installed: pip install {peer.install}"
    return runtime


def _prepare(
    manifest: dict[str, Any],
    weights: str | None,
    runtimes: list[Runtime],
    named: list[peers.Peer],
    scratch: Path,
    say: Callable[[str], None],
) -> tuple[Path, tuple[str, parity.Outputs], str | None]:
    """Convert the model for everyone; the example, what is expected for it, why nobody takes part."""
    example = scratch / "example.npy"
    inputs, expected, origin, note = reference(manifest, weights)
    np.save(example, inputs[0])
    others = [runtime for runtime in runtimes[1:] if runtime.error is None]
    if origin == "recorded":
        if others and named:
            raise ModelError(f"there is no model to give to other runtimes: {note}")
        del runtimes[1:]
        return example, (origin, expected[0]), note
    if others:
        model = _write_model(manifest, weights, scratch)
        for runtime in others:
            say(f"converting the model for {runtime.peer.name}")
            with runtime.step():
                _convert(runtime, model, example)
    return example, (origin, expected[0]), None


def _write_model(manifest: dict[str, Any], weights: str | None, scratch: Path) -> Path:
    from saevit_tvm.verbs.sources import recreate

    source = recreate(manifest, weights)
    if source.onnx is not None:
        file = scratch / "model.onnx"
        file.write_bytes(source.onnx.SerializeToString())
        return file
    import torch

    if isinstance(source.module, torch.fx.GraphModule):  # from a .pt2: it cannot be pickled
        torch.export.save(source.exported(), scratch / "model.pt2")
        return scratch / "model.pt2"
    torch.save(source.module, scratch / "model.pt")
    return scratch / "model.pt"


def _convert(runtime: Runtime, model: Path, example: Path) -> None:
    order = {"do": "convert", "peer": runtime.peer.name, "folder": str(runtime.folder)}
    order |= {"model": str(model), "example": str(example)}
    work = runtime.folder.with_suffix(".convert")
    work.mkdir()
    with PeerProcess(order, len(os.sched_getaffinity(0)), work) as process:
        process.reply()


# Measuring ----------------------------------------------------------


def _start(
    runtime: Runtime,
    threads: int,
    example: Path,
    scratch: Path,
    expected: tuple[str, parity.Outputs],
    processes: contextlib.ExitStack,
    say: Callable[[str], None],
) -> None:
    """A fresh process, its first answer timed and compared."""
    say(f"starting {runtime.peer.name}")
    runtime.size = runtime.peer.size(runtime.folder)
    outputs = scratch / f"{runtime.peer.name}.npz"
    work = runtime.folder.with_suffix(".serve")
    work.mkdir()
    order: dict[str, Any] = {"do": "serve", "peer": runtime.peer.name, "folder": str(runtime.folder)}
    order |= {"threads": threads, "example": str(example), "outputs": str(outputs)}
    runtime.process = processes.enter_context(PeerProcess(order, threads, work))
    runtime.first_ms = runtime.process.reply()["first_ms"]
    with np.load(outputs) as saved:
        answer = [saved[name] for name in saved.files]
    origin, values = expected
    answer = parity.sample(answer) if origin == "recorded" else answer
    runtime.max_abs_error = parity.deviation([answer], [values]).max_abs_error
    runtime.process.ask(warm=WARM_UP, runs=1, seconds=0.0)


def _take_turns(
    runtimes: list[Runtime],
    runs: int | None,
    seconds: float,
    trip: RoundTrip | None,
    say: Callable[[str], None],
) -> None:
    """Rounds in which everyone has one turn, each round beginning with another."""
    rounds = min(ROUNDS, runs) if runs else ROUNDS
    say(f"measuring in {rounds} rounds")
    for number in range(rounds):
        if trip:
            trip.measure()
        share = runs * (number + 1) // rounds - runs * number // rounds if runs else None
        for runtime in runtimes[number % len(runtimes) :] + runtimes[: number % len(runtimes)]:
            if runtime.process is None or runtime.error is not None:
                continue
            with runtime.step():
                time.sleep(SETTLE)
                told = runtime.process.ask(warm=1, runs=share, seconds=seconds / rounds)
                runtime.times += told["times"]
                runtime.cores.append(told["cores"])


# Telling ------------------------------------------------------------


def _result(
    path: Path,
    manifest: dict[str, Any],
    threads: int,
    runtimes: list[Runtime],
    trip: RoundTrip,
    note: str | None,
) -> dict[str, Any]:
    ours = runtimes[0]
    if ours.error is not None:
        raise PeerError(f"'{path}' could not be measured: {ours.error}.")
    median = float(np.median(ours.times))
    measured = [_row(runtime, threads, median) for runtime in runtimes if runtime.error is None]
    failed = [{"name": r.peer.name, "threads": threads, "error": r.error} for r in runtimes if r.error is not None]
    return {
        "artifact": str(path),
        "model": manifest["model"],
        "input_shape": manifest["inputs"][0]["shape"],
        "threads": threads,
        "results": measured,
        "failed": failed,
        "core_round_trip_ns": sorted(trip.nanoseconds),
        "note": note,
    }


def _row(runtime: Runtime, threads: int, ours: float) -> dict[str, Any]:
    p10, median, p90 = (float(value) for value in np.percentile(runtime.times, [10, 50, 90]))
    return {
        "name": runtime.peer.name,
        "threads": threads,
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "ratio": ours / median,
        "first_ms": runtime.first_ms,
        "size": runtime.size,
        "max_abs_error": runtime.max_abs_error,
        "cores_used": float(np.median(runtime.cores)),
        "runs": len(runtime.times),
    }
