"""bench: the artifact beside other runtimes, the same float32 model on the same number of threads.

Every runtime has a process of its own and they take turns: exactly one computes at any time, all are asked
equally often, and what the machine does meanwhile happens to all of them.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saevit_tvm.proof import parity
from saevit_tvm.runtime.artifact import check_runnable, read_manifest
from saevit_tvm.runtime.manifest import at_batch
from saevit_tvm.support import cpu, workspace
from saevit_tvm.support.errors import ModelError, UsageError
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.peers.base import write_example
from saevit_tvm.verbs.peers.process import PeerError, PeerProcess, serving
from saevit_tvm.verbs.roundtrip import RoundTrip
from saevit_tvm.verbs.verify import reference

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource

ROUNDS = 10
WARM_UP = 5
PEERS_DTYPE = "float32"  # of their weights and of their arithmetic
SETTLE = 0.25  # seconds; idle thread pools spin for a while before they sleep


@dataclass
class Runtime:
    """One runtime in this comparison."""

    peer: peers.Peer
    folder: Path
    process: PeerProcess | None = None
    error: str | None = None
    size: int = 0
    version: str = ""
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


@dataclass(frozen=True)
class Expected:
    """What PyTorch answers to the example, or what of it the manifest has kept."""

    origin: str
    outputs: parity.Outputs


@dataclass(frozen=True)
class Comparison:
    """An artifact and the runtimes beside it, all converted: ready to be measured, as often as wanted."""

    path: Path
    manifest: dict[str, Any]
    runtimes: list[Runtime]
    example: Path
    prepared: Path  # the same as the model itself takes it, for the others
    expected: Expected
    note: str | None
    scratch: Path
    say: Callable[[str], None]

    def of(self, path: Path) -> Comparison:
        """The same with another build of the same model in our place."""
        peers.OURS.convert(path, self.example, self.runtimes[0].folder)
        return replace(self, path=path, manifest=read_manifest(path))

    def measure(self, *, threads: int | None, runs: int | None, seconds: float) -> dict[str, Any]:
        """Everyone in turns, in fresh processes."""
        threads = check_threads(threads)
        runtimes = [Runtime(one.peer, one.folder, error=one.error) for one in self.runtimes]
        scratch = Path(tempfile.mkdtemp(dir=self.scratch))
        trip = RoundTrip(scratch)
        with contextlib.ExitStack() as processes:
            for runtime in runtimes:
                if runtime.error is None:
                    with runtime.step():
                        self.say(f"starting {runtime.peer.name}")
                        _start(runtime, threads, self, scratch, processes)
            _take_turns(runtimes, runs, seconds, trip if threads > 1 else None, self.say)
        return _result(self, threads, runtimes, trip)


def bench(
    path: Path,
    *,
    threads: int | None,
    against: Sequence[str] | None,
    runs: int | None,
    seconds: float,
    weights: str | None,
    batch: int | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure; `against=None` means PyTorch and every other runtime that is installed.

    Of an artifact for several batches the largest, or `batch`.
    """
    threads = check_threads(threads)
    with prepared(path, against=against, weights=weights, batch=batch, say=say) as comparison:
        return comparison.measure(threads=threads, runs=runs, seconds=seconds)


@contextlib.contextmanager
def prepared(
    path: Path,
    *,
    against: Sequence[str] | None,
    weights: str | None,
    batch: int | None = None,
    say: Callable[[str], None],
) -> Iterator[Comparison]:
    """The model converted for everyone who takes part."""
    named = [peers.get(name) for name in dict.fromkeys(against or [])]
    manifest = read_manifest(path)
    check_runnable(manifest, path)
    manifest = manifest if batch is None else at_batch(manifest, batch)
    with workspace.scratch() as scratch:
        runtimes = [_runtime(peer, scratch) for peer in (peers.OURS, *_choose(named, against is None))]
        example, prepared = scratch / "example.npy", scratch / "prepared.npy"
        expected, note = _prepare(manifest, weights, runtimes, named, example, prepared, say)
        peers.OURS.convert(path, example, runtimes[0].folder)
        yield Comparison(path, manifest, runtimes, example, prepared, expected, note, scratch, say)


def check_threads(threads: int | None) -> int:
    """So many, or all there are."""
    cores = cpu.cores()
    threads = cores if threads is None else threads
    if not 1 <= threads <= cores:
        raise UsageError(f"--threads {threads} is impossible: this process may use {cores} cores.")
    return threads


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
    example: Path,
    prepared: Path,
    say: Callable[[str], None],
) -> tuple[Expected, str | None]:
    """Write the example and convert the model for everyone; what is expected, and why nobody takes part."""
    inputs, expected, origin, note = reference(manifest, weights)
    write_example(example, inputs[0])
    others = [runtime for runtime in runtimes[1:] if runtime.error is None]
    if origin == "recorded":
        if others and named:
            raise ModelError(f"there is no model to give to other runtimes: {note}")
        del runtimes[1:]
        return Expected(origin, expected[0]), note
    if others:
        from saevit_tvm.models.recreate import recreate

        source = recreate(manifest, weights)
        write_example(prepared, source.prepared(*inputs[0]))
        model = _write_model(source, example.parent)
        for runtime in others:
            say(f"converting the model for {runtime.peer.name}")
            with runtime.step():
                _convert(runtime, model, prepared)
    return Expected(origin, expected[0]), None


def _write_model(source: ModelSource, scratch: Path) -> Path:
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
    with PeerProcess(order, cpu.cores(), work) as process:
        process.reply()


# Measuring ----------------------------------------------------------


def _start(
    runtime: Runtime, threads: int, comparison: Comparison, scratch: Path, processes: contextlib.ExitStack
) -> None:
    """A fresh process, its first answer timed and compared. One that answers wrongly is not worth timing."""
    runtime.size = runtime.peer.size(runtime.folder)
    ours = runtime.peer is peers.OURS
    example = comparison.example if ours else comparison.prepared
    start = serving(runtime.peer.name, runtime.folder, example, threads, scratch / runtime.peer.name)
    runtime.process, reply, answer = processes.enter_context(start)
    runtime.first_ms, runtime.version = reply["first_ms"], reply["version"]
    allowed = parity.allowed(comparison.manifest, None if ours else PEERS_DTYPE)
    runtime.max_abs_error = _judged(answer, comparison.expected, allowed)
    runtime.process.ask(warm=WARM_UP, runs=1, seconds=0.0)


def _judged(answer: parity.Outputs, expected: Expected, tolerance: float) -> float:
    """How far the answer is from what is expected, if that is not too far."""
    answer = parity.sample(answer) if expected.origin == "recorded" else answer
    shapes, wanted = [x.shape for x in answer], [x.shape for x in expected.outputs]
    if shapes != wanted:
        raise PeerError(f"it is not timed, because its answers have shapes {shapes} in place of {wanted}")
    answer = [each.astype(x.dtype, copy=False) for each, x in zip(answer, expected.outputs, strict=True)]
    deviation = parity.deviation([answer], [expected.outputs])
    if not deviation.within(tolerance):
        raise PeerError(
            f"it is not timed, because its answer deviates from the model's by {deviation.max_abs_error:.3g}"
        )
    return deviation.max_abs_error


def _take_turns(
    runtimes: list[Runtime],
    runs: int | None,
    seconds: float,
    trip: RoundTrip | None,
    say: Callable[[str], None],
) -> None:
    """Rounds in which everyone has one turn, each round beginning with another."""
    shares = divided(runs, ROUNDS)
    say(f"measuring in {len(shares)} rounds")
    for number, share in enumerate(shares):
        if trip:
            trip.measure()
        for runtime in runtimes[number % len(runtimes) :] + runtimes[: number % len(runtimes)]:
            if runtime.process is None or runtime.error is not None:
                continue
            with runtime.step():
                time.sleep(SETTLE)
                reply = runtime.process.ask(warm=1, runs=share, seconds=seconds / len(shares))
                runtime.times += reply["times"]
                runtime.cores.append(reply["cores"])


def divided(runs: int | None, rounds: int) -> list[int | None]:
    """How many of the answers fall to each round, at least one; None where time decides."""
    if runs is None:
        return [None] * rounds
    rounds = min(rounds, runs)
    return [runs * (number + 1) // rounds - runs * number // rounds for number in range(rounds)]


# Telling ------------------------------------------------------------


def _result(comparison: Comparison, threads: int, runtimes: list[Runtime], trip: RoundTrip) -> dict[str, Any]:
    manifest, ours = comparison.manifest, runtimes[0]
    if ours.error is not None:
        raise PeerError(f"'{comparison.path}' could not be measured: {ours.error}.")
    median = float(np.median(ours.times))
    measured = [_row(runtime, threads, median) for runtime in runtimes if runtime.error is None]
    measured[0]["dtype"] = manifest["dtype"]
    failed = [{"name": r.peer.name, "threads": threads, "error": r.error} for r in runtimes if r.error is not None]
    return {
        "artifact": str(comparison.path),
        "model": manifest["model"],
        "input_shape": manifest["inputs"][0]["shape"],
        "inputs": manifest["inputs"],
        "frames": manifest["recipe"].get("input") == "uint8",
        "threads": threads,
        "verified": manifest["verification"]["passed"],
        "results": measured,
        "failed": failed,
        "core_round_trip_ns": sorted(trip.nanoseconds),
        "note": comparison.note,
    }


def _row(runtime: Runtime, threads: int, ours: float) -> dict[str, Any]:
    taken = quantiles(runtime.times)
    return {
        "name": runtime.peer.name,
        "version": runtime.version,
        "dtype": PEERS_DTYPE,
        "threads": threads,
        **taken,
        "ratio": ours / taken["median_ms"],
        "first_ms": runtime.first_ms,
        "size": runtime.size,
        "max_abs_error": runtime.max_abs_error,
        "cores_used": float(np.median(runtime.cores)),
        "runs": len(runtime.times),
    }


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """The middle of what was measured, and how far it scatters."""
    p10, median, p90 = (float(value) for value in np.percentile(times, [10, 50, 90]))
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90}
