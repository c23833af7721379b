"""bench A B: two artifacts beside each other, for differences of a few percent.

What a process gets by chance (its pages, its place in the caches) it keeps, and that may be more than two builds
differ by. So each artifact has many processes, one after the other, and each is compared with its neighbour of the
other artifact alone, before the machine changes: the answer is the median of these ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm import backends
from saevit_tvm.proof import parity
from saevit_tvm.runtime.artifact import check_runnable, read_manifest
from saevit_tvm.runtime.tensors import specs_of
from saevit_tvm.support import workspace
from saevit_tvm.support.errors import UsageError
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.bench import WARM_UP, check_threads, divided, quantiles
from saevit_tvm.verbs.peers.base import write_example
from saevit_tvm.verbs.peers.process import PeerError, serving
from saevit_tvm.verbs.roundtrip import RoundTrip

PAIRS = 10
COUNTS = ("instructions", "launches", "bytes", "bytes_loaded", "bytes_stored", "float_ops")
NAMES = {"model": "model", "weights_digest": "weights", "dtype": "dtype"}  # what makes a model another one


@dataclass
class Side:
    """One of the two; `times` and `first_ms` have an entry for each of its processes."""

    path: Path
    manifest: dict[str, Any]
    folder: Path
    times: list[list[float]] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    answer: parity.Outputs = field(default_factory=list)


def pair(
    paths: Sequence[Path],
    *,
    pairs: int | None,
    threads: int | None,
    runs: int | None,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """How long the first takes beside the second; `runs` or `seconds` are for all processes of each."""
    threads = check_threads(threads)
    manifests = [read_manifest(path) for path in paths]
    for manifest, path in zip(manifests, paths, strict=True):
        check_runnable(manifest, path)
    _check_alike(paths, manifests)
    with workspace.scratch() as scratch:
        example = scratch / "example.npy"
        write_example(example, parity.random_inputs(specs_of(manifests[0]["inputs"]), 1)[0])
        sides = [Side(*each) for each in zip(paths, manifests, (scratch / "a", scratch / "b"), strict=True)]
        for side in sides:
            side.folder.mkdir()
            peers.OURS.convert(side.path, example, side.folder)
        trip = RoundTrip(scratch)
        shares = divided(runs, PAIRS if pairs is None else pairs)
        say(f"measuring in {len(shares)} pairs of processes")
        for number, share in enumerate(shares):
            if threads > 1:
                trip.measure()
            for side in sides[::-1] if number % 2 else sides:
                work = scratch / f"{side.folder.name}{number}"
                _measure(side, example, threads, share, seconds / len(shares), work)
    return _result(sides, threads, trip)


def emulated_pair(paths: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """What one inference of each executes, or asks of a GPU, and the first's share of the second's."""
    from saevit_tvm.verbs.counted import emulated

    manifests = [read_manifest(path) for path in paths]
    _check_alike(paths, manifests)
    if len({backends.described(manifest).is_gpu for manifest in manifests}) > 1:
        raise UsageError(
            f"one of '{paths[0]}' and '{paths[1]}' is for a CPU, the other for a GPU, and instructions do not compare "
            "with launches: give two for CPUs, or two for GPUs."
        )
    first, second = (emulated(path, say) for path in paths)
    return {
        "artifacts": [first, second],
        "kind": first["kind"],
        "ratios": {name: _ratio(first[name], second[name]) for name in COUNTS if name in first},
        "note": _note(manifests),
    }


def _ratio(first: int, second: int) -> float | None:
    return first / second if second else None


# Preparing ----------------------------------------------------------


def _check_alike(paths: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    """One input must do for both, and their answers must be comparable."""
    for what in ("inputs", "outputs"):
        first, second = ([(each["shape"], each["dtype"]) for each in manifest[what]] for manifest in manifests)
        if first != second:
            raise UsageError(
                f"'{paths[0]}' and '{paths[1]}' cannot be compared, because their {what} are {_tensors(first)} and "
                f"{_tensors(second)}: build both with the same --model, --batch and --image-size."
            )


def _tensors(tensors: list[tuple[list[int], str]]) -> str:
    return ", ".join(f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype in tensors)


def _note(manifests: Sequence[dict[str, Any]]) -> str | None:
    first, second = manifests
    differ = [name for key, name in NAMES.items() if first[key] != second[key]]
    return f"these are not two builds of one model: they differ in {' and '.join(differ)}" if differ else None


# Measuring ----------------------------------------------------------


def _measure(side: Side, example: Path, threads: int, share: int | None, seconds: float, work: Path) -> None:
    """One process from start to end: exactly one computes at any time."""
    try:
        with serving(peers.OURS.name, side.folder, example, threads, work) as (process, reply, answer):
            times = process.ask(warm=WARM_UP, runs=share, seconds=seconds)["times"]
    except PeerError as error:
        raise PeerError(f"'{side.path}' could not be measured: {error}.") from error
    side.times.append(times)
    side.first_ms.append(reply["first_ms"])
    side.answer = answer


# Telling ------------------------------------------------------------


def _result(sides: Sequence[Side], threads: int, trip: RoundTrip) -> dict[str, Any]:
    first, second = sides
    ratios = [float(np.median(a) / np.median(b)) for a, b in zip(first.times, second.times, strict=True)]
    p10, ratio, p90 = (float(value) for value in np.percentile(ratios, [10, 50, 90]))
    return {
        "artifacts": [_row(side) for side in sides],
        "input_shape": first.manifest["inputs"][0]["shape"],
        "threads": threads,
        "ratio": ratio,
        "ratio_p10": p10,
        "ratio_p90": p90,
        "ratios": ratios,
        **_difference(first.answer, second.answer),
        "core_round_trip_ns": sorted(trip.nanoseconds),
        "note": _note([side.manifest for side in sides]),
    }


def _row(side: Side) -> dict[str, Any]:
    return {
        "artifact": str(side.path),
        "model": side.manifest["model"],
        "target": side.manifest["target"]["name"],
        "dtype": side.manifest["dtype"],
        **quantiles([time for times in side.times for time in times]),
        "first_ms": float(np.median(side.first_ms)),
        "runs": sum(map(len, side.times)),
    }


def _difference(first: parity.Outputs, second: parity.Outputs) -> dict[str, Any]:
    """Bit for bit, or how far apart; no distance where one has NaN or infinity."""
    both = list(zip(first, second, strict=True))
    equal = all(a.tobytes() == b.tobytes() for a, b in both)
    apart = 0.0 if equal else float(np.max([np.abs(np.subtract(a, b, dtype=np.float64)).max() for a, b in both]))
    return {"equal": equal, "max_abs_difference": apart if math.isfinite(apart) else None}
