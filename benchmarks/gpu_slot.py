#!/usr/bin/env python3
"""SAEViT on an NVIDIA GPU that is lent for a quarter of an hour, beside PyTorch, in two halves.

    python benchmarks/gpu_slot.py prepare --out gpu.tar.xz             here: builds, packs; no GPU is needed
    python3 -c "import tarfile; tarfile.open('gpu.tar.xz').extractall()"
    python3 gpu/gpu_slot.py measure --seconds 480 --results DIR        there: needs PyTorch and NVIDIA's driver
    python3 gpu/gpu_slot.py table --results DIR                        there or here: what has been measured
    saevit-tvm tune --import-results DIR/CARD/candidates-0.jsonl       here: what was found out about kernels

What matters most is packed first, and what does not fit into --minutes and --mib is left out: SAEViT-XS in float16 at
batch 1 and 64 and in float32, SAEViT-S in float16, candidates of tuning for the first, then the rest.

`measure` has one deadline for everything. Half a minute goes to checks that ours runs and is right. Then all take
turns, three times, on the same random weights (made from a seed on both sides) and on random pictures, channels last
for PyTorch, each compared with float64 before it is timed; one that fails before it ever worked is not asked again.
PyTorch's max-autotune searches meanwhile, in a process of its own. Then come candidates, then the rest. Times are
medians of CUDA events around single inferences, inputs and outputs on the GPU, and of events around many in a row. Each
result is on the disk before the next step begins, in a folder for the card and the archive; the same command goes on
after the last.

`--short` rehearses it on this machine's CPU: behind a stand-in for NVIDIA's driver where CUDA's compiler is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_slot_contenders import CONTENDERS, IN_TURN, OURS, Refused, coarse_weights
from gpu_slot_measure import FIRST, MANIFEST, measure, show

Row = dict[str, Any]

SEED = 7
PROGRAM = ("gpu_slot.py", "gpu_slot_measure.py", "gpu_slot_contenders.py")
MODELS, BATCHES = ("saevit_xs", "saevit_s"), (1, 64, 256, 8)  # what is worth more comes first
DTYPES = ("float16", "float32", "tf32", "bfloat16")
PACKING_SECONDS = 30.0  # that are left for the end of the archive
# With --short: both halves on this machine's CPU.
SHORT_PREPARE = "prepare --models saevit_micro --image-size 32 --dtypes float32 --batches 1 --candidates 2"
SHORT_MEASURE = "measure --seconds 240 --rehearsal --contenders saevit-tvm,torch,torch-graph"


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.half is None and not options.short:
        parser.error("say which half, or --short")
    half = short if options.short else {"prepare": prepare, "measure": measure, "table": show}[options.half]
    name = Path(__file__).name
    try:
        return half(options)
    except Refused as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, as a rule
        print(f"{name}: {error.strerror or error} ({error.filename or 'results'})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped; what was measured is kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"for CI: {SHORT_PREPARE}, and there {SHORT_MEASURE}")
    parser.add_argument("--out", type=Path, help="folder in which --short leaves what it makes; by default nowhere")
    halves = parser.add_subparsers(dest="half")
    make = halves.add_parser("prepare", help="build, the most important first, and pack")
    make.add_argument("--target", default="cuda-sm_90")
    make.add_argument("--models", type=_listed, default=list(MODELS))
    make.add_argument("--batches", type=lambda text: [int(each) for each in _listed(text)], default=list(BATCHES))
    make.add_argument("--dtypes", type=_listed, help="default: all that the target computes in")
    make.add_argument("--image-size", type=int, default=224)
    make.add_argument("--candidates", type=int, default=96, help="of tuning, for the first model")
    make.add_argument("--store", type=Path, help="tuned records, as `saevit-tvm build` takes them")
    make.add_argument("--minutes", type=float, default=10.0, help="begin nothing that would take longer")
    make.add_argument("--mib", type=float, default=40.0, help="the most that the archive may take")
    make.add_argument("--out", type=Path, default=Path("gpu.tar.xz"))
    make.set_defaults(stand_in=None)
    take = halves.add_parser("measure", help="measure what is beside this file")
    take.add_argument("--seconds", type=float, help="end after so long")
    take.add_argument("--results", type=Path, help="folder for the results; default: beside this file")
    take.add_argument("--contenders", type=_contenders, help=f"of: {', '.join(CONTENDERS)}; default: all")
    take.add_argument("--runtime", type=Path, action="append", default=[], help="folder of libtvm_runtime.so")
    take.add_argument("--rehearsal", action="store_true", help="PyTorch computes on the CPU")
    take.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    told = halves.add_parser("table", help="show what has been measured")
    told.add_argument("--results", type=Path, help="folder of the results; default: beside this file")
    return parser


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _contenders(text: str) -> list[str]:
    if unknown := set(_listed(text)) - set(CONTENDERS):
        raise argparse.ArgumentTypeError(f"there is no {min(unknown)}; there are {', '.join(CONTENDERS)}")
    return _listed(text)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Building and packing -----------------------------------------------------------


def prepare(options: argparse.Namespace) -> int:
    from saevit_tvm import targets
    from saevit_tvm.support.errors import SaevitError
    from saevit_tvm.tuning.bundle import check_name

    try:
        check_name(options.out)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
            packed = Path(scratch) / options.out.name
            with Archive(packed) as archive:
                Preparation(options, targets.get(options.target), Path(scratch), archive).run()
            packed.replace(options.out)
    except SaevitError as error:
        raise Refused(str(error)) from error
    name = options.out.name.partition(".")[0]
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
    print(f"there: python3 -c \"import tarfile; tarfile.open('{options.out.name}').extractall()\"")
    print(f"       python3 {name}/gpu_slot.py measure --seconds 480 --results results")
    return 0


class Archive:
    """A tar that is written as things come, all in one folder, so that what it has grown to is known."""

    def __init__(self, path: Path) -> None:
        import gzip
        import lzma

        self._folder = path.name.partition(".")[0]
        self._file = path.open("wb")
        # Libraries of one model have the same weights: what is in one need not be packed again with the next.
        # A dictionary that remembers so much is slow to search but with hash chains, and these miss little.
        how = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 192 << 20, "mf": lzma.MF_HC4}
        self._packer: Any = None
        if path.suffix == ".xz":
            self._packer = lzma.LZMAFile(self._file, "w", filters=[how])  # noqa: SIM115
        elif path.suffix == ".gz":
            self._packer = gzip.GzipFile(fileobj=self._file, mode="w")
        self._tar = tarfile.open(fileobj=self._packer or self._file, mode="w")  # noqa: SIM115

    def add(self, path: Path, name: str) -> None:
        self._tar.add(path, f"{self._folder}/{name}")

    @property
    def mib(self) -> float:
        return self._file.tell() / 2**20

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        if self._packer is not None:
            self._packer.close()
        self._file.close()


class Preparation:
    """What matters most is built and packed first, and what there is no time or no room for is left out."""

    def __init__(self, options: argparse.Namespace, target: Any, scratch: Path, archive: Archive) -> None:
        self._options, self._target, self._scratch, self._archive = options, target, scratch, archive
        self._end = time.monotonic() + 60 * options.minutes - PACKING_SECONDS
        self._longest = self._largest = 0.0  # seconds and MiB of one artifact
        self.manifest: Row = {"target": target.name, "kind": target.kind, "tvm": target.tvm, "seed": SEED}
        self.manifest |= {"image_size": options.image_size, "models": {}, "artifacts": [], "candidates": []}

    def run(self) -> None:
        self._program()
        wanted = ordered(self._options.models, self._options.batches, self._dtypes())
        for at, (model, batch, dtype) in enumerate(wanted):
            if not self._fits():
                left = ", ".join(f"{model} {batch} {dtype}" for model, batch, dtype in wanted[at:])
                say(f"left out, for want of time or room: {left}")
                break
            self._artifact(model, batch, dtype)
            if at == 0 and self._overlaps():
                with _in_turn():
                    self._artifact(model, batch, dtype, IN_TURN)
            if at == min(FIRST, len(wanted)) - 1:
                self._candidates(*wanted[0])
        if not self.manifest["artifacts"]:
            raise Refused("there is no time or no room for anything: allow more with --minutes or --mib")
        self._written(MANIFEST, json.dumps(self.manifest, indent=1).encode())

    def _dtypes(self) -> list[str]:
        return self._options.dtypes or [dtype for dtype in DTYPES if dtype in self._target.dtypes]

    def _fits(self) -> bool:
        """Whether one more would, if it is like the greatest so far."""
        room = self._archive.mib + self._largest <= self._options.mib
        return room and time.monotonic() + self._longest < self._end

    def _overlaps(self) -> bool:
        from schedules.machines.gpus import limits_of

        return self._target.kind == "cuda" and limits_of(self._target.tvm).overlaps

    def _program(self) -> None:
        """What runs there, and TVM's runtime."""
        from saevit_tvm.measure import offline
        from saevit_tvm.models import saevit
        from saevit_tvm.tuning.bundle import runtime_libraries

        here = Path(__file__).resolve().parent
        for path in (*(here / name for name in PROGRAM), Path(saevit.__file__), Path(offline.__file__)):
            self._archive.add(path, path.name)
        for name, library in runtime_libraries(self._target, everything=True).items():
            self._archive.add(library.resolve(), f"runtime/{name}")

    def _written(self, name: str, data: bytes) -> None:
        path = self._scratch / name
        path.write_bytes(data)
        self._archive.add(path, name)

    def _weights(self, model: str) -> Path:
        """The weights as a file; their digest goes into the manifest."""
        from saevit_tvm import models
        from saevit_tvm.models.weights import save_state

        path = self._scratch / f"{model}.safetensors"
        if not path.exists():
            module = models.create(model).eval()
            self.manifest["models"][model] = {"weights": coarse_weights(module, SEED)}
            save_state(module, path, {})
        return path

    def _artifact(self, model: str, batch: int, dtype: str, contender: str = OURS) -> None:
        from saevit_tvm.backends import compile_model
        from saevit_tvm.models.opening import open_model
        from saevit_tvm.tuning.records import open_records

        say(f"building {model}, batch {batch}, {dtype}{', in turn' if contender == IN_TURN else ''}")
        began, before = time.monotonic(), self._archive.mib
        weights, size = str(self._weights(model)), self._options.image_size
        source = open_model(model, weights=weights, batch=batch, image_size=size)
        records = open_records(self._options.store, self._target)
        compiled = compile_model(source, self._target, records=records, dtype=dtype)
        library = self._scratch / f"{model}-b{batch}-{dtype}{contender.removeprefix(OURS)}.so"
        compiled.export(library)
        for warning in compiled.warnings:
            say(f"warning: {warning}")
        row: Row = {"contender": contender, "model": model, "batch": batch, "dtype": dtype, "file": library.name}
        row |= {"kernels": compiled.kernels, "sha256": hashlib.sha256(library.read_bytes()).hexdigest()}
        self.manifest["artifacts"].append(row | _launched(compiled))
        if self._options.stand_in:
            self._options.stand_in.add(library, compiled.code.source)
        self._archive.add(library, library.name)
        library.unlink()
        self._longest = max(self._longest, time.monotonic() - began)
        self._largest = max(self._largest, self._archive.mib - before)

    def _candidates(self, model: str, batch: int, dtype: str) -> None:
        """Of tuning, compiled, with all that it takes to measure them but the program and the runtime."""
        from saevit_tvm.verbs.tune import export_candidates

        name = f"candidates-{len(self.manifest['candidates'])}"
        packed = self._scratch / f"{name}.tar"
        export_candidates(
            packed,
            model=model,
            target=self._target.name,
            trials=self._options.candidates,
            store=self._options.store,
            weights=str(self._weights(model)),
            image_size=self._options.image_size,
            batch=batch,
            dtype=dtype,
            say=say,
        )
        with tarfile.open(packed) as tar:
            tar.extractall(self._scratch)
        (self._scratch / name / "run.py").unlink()
        if self._options.stand_in:
            self._options.stand_in.add_candidates(self._scratch / name, self._target)
        self._archive.add(self._scratch / name, name)
        self.manifest["candidates"].append({"folder": name, "model": model, "batch": batch, "dtype": dtype})


def ordered(models: list[str], batches: list[int], dtypes: list[str]) -> list[tuple[str, int, str]]:
    """What is worth most comes first: the first model alone and in a batch, with more digits, the second model."""
    first = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    places = itertools.product(range(len(batches)), range(len(dtypes)), range(len(models)))
    rest = [(model, batch, dtype) for dtype, batch, model in sorted((d, b, m) for b, d, m in places)]
    wanted = [each for each in first if each in rest]
    wanted += [each for each in rest if each not in wanted]
    return [(models[model], batches[batch], dtypes[dtype]) for model, batch, dtype in wanted]


def _launched(compiled: Any) -> Row:
    """What an inference asks of a GPU."""
    if compiled.target.kind == "llvm":
        return {}
    from saevit_tvm.backends.launches import launches

    each = launches(compiled.module)
    return {
        "launches": sum(launch["calls"] for launch in each),
        "bytes": sum(launch["calls"] * launch["bytes"] for launch in each),
        "float_ops": sum(launch["calls"] * launch["float_ops"] for launch in each),
    }


@contextlib.contextmanager
def _in_turn() -> Iterator[None]:
    """The setting in which kernels are built to be launched one after the other."""
    from dataclasses import replace

    from schedules.machines.gpus import CUDA_LIMITS

    before = dict(CUDA_LIMITS)
    CUDA_LIMITS.update({sm: replace(limits, overlaps=False) for sm, limits in before.items()})
    try:
        yield
    finally:
        CUDA_LIMITS.update(before)


# Both halves here ---------------------------------------------------------------


def short(options: argparse.Namespace) -> int:
    """Packed, unpacked and measured: behind the stand-in for a GPU, or where that is missing by this CPU's code."""
    from saevit_tvm.backends import nvrtc
    from saevit_tvm.emulators import cuda

    parser = _parser()
    missing = nvrtc.missing() or cuda.missing()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        packed, target = folder / "short.tar.xz", ["--target", "native"] if missing else []
        given = parser.parse_args([*SHORT_PREPARE.split(), *target, "--out", str(packed)])
        given.stand_in = None if missing else StandIn(folder / "stand-in")
        if status := prepare(given):
            return status
        with tarfile.open(packed) as tar:
            tar.extractall(folder)
        line = [sys.executable, str(folder / "short" / PROGRAM[0]), *SHORT_MEASURE.split()]
        environment = None
        if given.stand_in is not None:
            environment = {**os.environ, **given.stand_in.environment("sm_90")}
        return subprocess.run([*line, "--results", str(folder / "results")], check=False, env=environment).returncode


class StandIn:
    """The kernels of everything that is packed, once more for this CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, library: Path, source: str) -> None:
        from saevit_tvm.emulators import cuda

        cuda.kernels(source, cuda.kernels_of(library, self.folder))

    def add_candidates(self, folder: Path, target: Any) -> None:
        """Their sources are made again from what the manifest says of them."""
        from saevit_tvm.measure.offline import MANIFEST as CANDIDATES
        from saevit_tvm.tuning import replay

        manifest = json.loads((folder / CANDIDATES).read_text())
        kernels = {key: replay.unpack_workload(each["module"]) for key, each in manifest["kernels"].items()}
        for key, each in manifest["kernels"].items():
            self.add(folder / each["reference"]["file"], _source(kernels[key].mod, target))
        for each in manifest["candidates"]:
            schedule = replay.apply(kernels[each["kernel"]], each["trace"])
            self.add(folder / each["file"], _source(schedule.mod, target))

    def environment(self, architecture: str) -> dict[str, str]:
        from saevit_tvm.emulators import cuda

        return cuda.environment_of(self.folder, architecture, self.folder)


def _source(module: Any, target: Any) -> str:
    """A candidate as CUDA C++."""
    import tvm

    from saevit_tvm import backends
    from saevit_tvm.backends.device_code import source_of
    from schedules.kernels import declared

    backend = backends.get(target.kind)
    if declared(module["main"]) is not None:
        module = backend.with_loops(module, target.tvm)
    with backend.generating(module, target.tvm):
        return source_of(tvm.tirx.build(module, target=tvm.target.Target(target.tvm)))


if __name__ == "__main__":
    sys.exit(main())
