#!/usr/bin/env python3
"""SAEViT on an NVIDIA GPU beside PyTorch, in two halves, because a GPU may be lent for minutes and have no compiler.

    python benchmarks/cuda.py prepare --out h200.tar.xz                here: builds, packs; no GPU is needed
    tar xf h200.tar.xz && python3 h200/bench.py measure --seconds 540  there: needs PyTorch and NVIDIA's driver
    python3 h200/bench.py table                                        there or here: what has been measured

`measure` takes one step after the other, the most important first, and writes each result as soon as it is there; the
same command goes on after the last one. Each contender computes on the same random weights (made from a seed on both
sides) and on random pictures, and is compared with float64 before it is timed; one that deviates is not timed. Times
are medians of CUDA events around single inferences, inputs and outputs on the GPU, and of events around many in a row.
Beside them stand what this very GPU reaches in a copy and in matrix products.

`prepare --target native` makes the same for this machine's CPU: that is how the script itself is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SEED = 7
MANIFEST, RESULTS, TABLE = "manifest.json", "results.jsonl", "results.md"
PACKED = "bench.py"  # this file's name there: NVIDIA has a package `cuda`, which PyTorch may look for
MODELS, BATCHES = ("saevit_xs", "saevit_s"), (1, 8, 64, 256)
DTYPES = ("float32", "tf32", "float16", "bfloat16")
OURS, IN_TURN = "saevit-tvm", "saevit-tvm-in-turn"  # the other: no kernel begins while the one before it ends
# Deviations from float64, by norms, that a contender may have in each arithmetic.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}
STEP_SECONDS = 240.0
PICTURES = 3  # different inputs, in turns
LIMIT_NAMES = ("copy", "float32", "tf32", "float16", "bfloat16")
# With --short: both halves on this machine's CPU.
SHORT_PREPARE = "prepare --target native --models saevit_micro --image-size 32 --dtypes float32 --batches 3"
SHORT_MEASURE = "measure --contenders saevit-tvm,torch"


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    if options.half is None and not options.short:
        parser.error("say which half, or --short")
    half = short if options.short else {"prepare": prepare, "measure": measure, "table": table}[options.half]
    here = Path(__file__).resolve().parent
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != here]  # see PACKED
    try:
        return half(options)
    except Refused as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, as a rule
        print(f"{Path(__file__).name}: {error.strerror or error} ({error.filename or 'results'})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: stopped; what was measured is kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"for CI: {SHORT_PREPARE}, and there {SHORT_MEASURE}")
    parser.add_argument("--out", type=Path, help="folder in which --short leaves what it makes; by default nowhere")
    halves = parser.add_subparsers(dest="half")
    make = halves.add_parser("prepare", help="build everything and pack it")
    make.add_argument("--target", default="cuda-sm_90")
    make.add_argument("--models", type=_listed, default=list(MODELS))
    make.add_argument("--batches", type=lambda text: [int(each) for each in _listed(text)], default=list(BATCHES))
    make.add_argument("--dtypes", type=_listed, help="default: all that the target computes in")
    make.add_argument("--image-size", type=int, default=224)
    make.add_argument("--store", type=Path, help="tuned records, as `saevit-tvm build` takes them")
    make.add_argument("--out", type=Path, default=Path("cuda.tar.xz"))
    take = halves.add_parser("measure", help="measure what is beside this file")
    take.add_argument("--seconds", type=float, help="begin no step after so long")
    take.add_argument("--contenders", type=_contenders, help=f"of: {', '.join(CONTENDERS)}; default: all, in rounds")
    take.add_argument("--runtime", type=Path, action="append", default=[], help="folder of libtvm_runtime.so")
    take.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    halves.add_parser("table", help="show what has been measured")
    return parser


class Refused(Exception):
    """Why it cannot go on, in one sentence."""


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _contenders(text: str) -> list[str]:
    if unknown := set(_listed(text)) - set(CONTENDERS):
        raise argparse.ArgumentTypeError(f"there is no {min(unknown)}; there are {', '.join(CONTENDERS)}")
    return _listed(text)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def short(options: argparse.Namespace) -> int:
    """Packed, unpacked and measured, all here."""
    import tarfile
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        packed = folder / "short.tar.xz"
        if status := prepare(_parser().parse_args([*SHORT_PREPARE.split(), "--out", str(packed)])):
            return status
        with tarfile.open(packed) as tar:
            tar.extractall(folder)
        line = [sys.executable, str(folder / "short" / PACKED), *SHORT_MEASURE.split()]
        return subprocess.run(line, check=False).returncode


# Both halves: the model -------------------------------------------------


def coarse_weights(module: Any, seed: int) -> str:
    """Random weights with few digits, the same on every machine, and their digest.

    Few digits, so that many libraries full of them can be packed small; BatchNorm's factors are powers of two, so that
    they stay few when it is folded.
    """
    import numpy as np
    import torch

    stream, digest = np.random.RandomState(seed), hashlib.sha256()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            levels = stream.randint(-15, 16, tuple(tensor.shape)) / 16
            if name.endswith("running_var"):
                values = np.full(levels.shape, 1 - 1e-5)
            elif tensor.dim() > 1 and tensor[0].numel() > 1 and "gain" not in name:
                values = levels * 2.0 ** np.floor(np.log2((3 / tensor[0].numel()) ** 0.5))
            elif name.endswith("weight"):  # the factors of a normalisation
                values = np.where(levels > 0, 1.0, 0.5)
            else:
                values = levels / 4
            tensor.copy_(torch.from_numpy(values.astype("float32")))
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# Here: building and packing ---------------------------------------------


def prepare(options: argparse.Namespace) -> int:
    import tarfile
    import tempfile

    from saevit_tvm import targets
    from saevit_tvm.support.errors import SaevitError
    from saevit_tvm.tuning.bundle import MODES, check_name

    try:
        check_name(options.out)
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except (SaevitError, OSError) as error:
        raise Refused(str(error)) from error
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        name = options.out.name.partition(".")[0]
        folder = Path(scratch) / name
        folder.mkdir()
        try:
            _fill(folder, targets.get(options.target), options)
        except SaevitError as error:
            raise Refused(str(error)) from error
        packed = Path(scratch) / options.out.name
        say("packing")
        if options.out.suffix == ".xz":
            import lzma

            # Libraries of one model have the same weights: what is in one need not be packed again with the next.
            # A dictionary that remembers so much is slow to search but with hash chains, and these miss little.
            how = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 192 << 20, "mf": lzma.MF_HC4}
            with lzma.open(packed, "w", filters=[how]) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
                tar.add(folder, name)
        else:
            with tarfile.open(packed, MODES[options.out.suffix]) as tar:
                tar.add(folder, name)
        packed.replace(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
    print(f"there: tar xf {options.out.name} && python3 {name}/{PACKED} measure --seconds 540")
    return 0


def _fill(folder: Path, target: Any, options: argparse.Namespace) -> None:
    """Everything that the other half needs."""
    import shutil

    from saevit_tvm.measure import offline
    from saevit_tvm.models import saevit
    from saevit_tvm.tuning.bundle import runtime_libraries
    from schedules.machines.gpus import limits_of

    for source, name in ((__file__, PACKED), (saevit.__file__, "saevit.py"), (offline.__file__, "offline.py")):
        shutil.copy(source, folder / name)
    (folder / "runtime").mkdir()
    for name, library in runtime_libraries(target, everything=True).items():
        shutil.copy(library, folder / "runtime" / name)
    dtypes = options.dtypes or [dtype for dtype in DTYPES if dtype in target.dtypes]
    manifest: Row = {"target": target.name, "kind": target.kind, "tvm": target.tvm, "image_size": options.image_size}
    manifest |= {"seed": SEED, "models": {}, "artifacts": []}
    for model in options.models:
        weights = folder / f"{model}.safetensors"
        manifest["models"][model] = {"weights": _written(model, weights)}
        for dtype in dtypes:
            for batch in options.batches:
                manifest["artifacts"].append(_built(folder, weights, target, model, batch, dtype, options))
                if batch == 1 and target.kind == "cuda" and limits_of(target.tvm).overlaps:
                    with _in_turn():
                        one = _built(folder, weights, target, model, batch, dtype, options, IN_TURN)
                    manifest["artifacts"].append(one)
        weights.unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _written(model: str, path: Path) -> str:
    """The weights as a file, and their digest."""
    from saevit_tvm import models
    from saevit_tvm.models.weights import save_state

    module = models.create(model).eval()
    digest = coarse_weights(module, SEED)
    save_state(module, path, {})
    return digest


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


def _built(
    folder: Path,
    weights: Path,
    target: Any,
    model: str,
    batch: int,
    dtype: str,
    options: argparse.Namespace,
    contender: str = OURS,
) -> Row:
    from saevit_tvm.backends import compile_model
    from saevit_tvm.models.opening import open_model
    from saevit_tvm.tuning.records import open_records

    say(f"building {model}, batch {batch}, {dtype}{', in turn' if contender == IN_TURN else ''}")
    source = open_model(model, weights=str(weights), batch=batch, image_size=options.image_size)
    compiled = compile_model(source, target, records=open_records(options.store, target), dtype=dtype)
    library = folder / f"{model}-b{batch}-{dtype}{contender.removeprefix(OURS)}.so"
    compiled.export(library)
    for warning in compiled.warnings:
        say(f"warning: {warning}")
    row: Row = {"contender": contender, "model": model, "batch": batch, "dtype": dtype, "file": library.name}
    row["kernels"] = compiled.kernels
    row["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    if target.kind != "llvm":
        from saevit_tvm.backends.launches import launches

        each = launches(compiled.module)
        row |= {
            "launches": sum(launch["calls"] for launch in each),
            "bytes": sum(launch["calls"] * launch["bytes"] for launch in each),
            "float_ops": sum(launch["calls"] * launch["float_ops"] for launch in each),
        }
    return row


# There: the steps -------------------------------------------------------

CONTENDERS = (OURS, IN_TURN, "torch", "torch-graph", "torch-compile", "torch-compile-max", "onnxruntime")
WORTH = {1: 0, 64: 1, 256: 2, 8: 3}  # batch sizes
# What is worth the most comes first. Compiling with max-autotune takes minutes, so it has a round of its own.
ROUNDS = (
    ("limits",),
    (OURS, IN_TURN, "torch", "torch-graph"),
    ("torch-compile",),
    ("torch-compile-max",),
    ("onnxruntime",),
)


def steps(manifest: Row, contenders: Sequence[str] | None = None) -> Iterator[Row]:
    """All there is to measure, the most important first."""
    batches = sorted({each["batch"] for each in manifest["artifacts"]}, key=lambda batch: (WORTH.get(batch, 9), batch))
    dtypes = [dtype for dtype in ("float16", "float32", "tf32", "bfloat16") if _comparable(dtype, manifest)]
    for group in ROUNDS:
        if "limits" in group:
            yield from ({"contender": "limits", "limit": name} for name in LIMIT_NAMES)
            continue
        for model, batch, dtype in itertools.product(manifest["models"], batches, dtypes):
            for contender in group:
                step = {"contender": contender, "model": model, "batch": batch, "dtype": dtype}
                wanted = contenders is None or contender in contenders
                if wanted and (contender not in (OURS, IN_TURN) or _artifact(manifest, step)):
                    yield step


def _comparable(dtype: str, manifest: Row) -> bool:
    """PyTorch is asked for every arithmetic of a GPU, whatever ours computes in; on a CPU for ours alone."""
    return manifest["kind"] == "cuda" or any(each["dtype"] == dtype for each in manifest["artifacts"])


def _artifact(manifest: Row, step: Row) -> Row | None:
    return next((each for each in manifest["artifacts"] if step.items() <= each.items()), None)


def measure(options: argparse.Namespace) -> int:
    """The parent: hands steps to a worker that may crash or hang, and keeps what comes back."""
    folder = Path(__file__).resolve().parent
    manifest = _read_manifest(folder)
    if options.worker is not None:
        return serve(folder, manifest, options)
    if importlib.util.find_spec("torch") is None:
        raise Refused("PyTorch is not installed here: use a Python that has it.")
    results = folder / RESULTS
    done = [json.dumps(row["step"], sort_keys=True) for row in _rows(results)]
    todo = [step for step in steps(manifest, options.contenders) if json.dumps(step, sort_keys=True) not in done]
    end = None if options.seconds is None else time.monotonic() + options.seconds
    worker: Worker | None = None
    try:
        for step in todo:
            if end is not None and time.monotonic() > end:
                break
            worker = worker or Worker(folder, options.runtime)
            left = STEP_SECONDS if end is None else min(STEP_SECONDS, max(10.0, end + 30 - time.monotonic()))
            told = worker.ask(step, left)
            if told.pop("lost", False):
                worker.end()
                worker = None
            if not told.pop("again", False):  # out of time is no result
                with results.open("a") as file:
                    file.write(json.dumps({"step": step, **told}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            say(f"{_named(step)}: {told.get('median_ms') or told.get('rate') or told.get('error')}")
    finally:
        if worker is not None:
            worker.end()
    print(_table(manifest, _rows(results), folder))
    return 0


def _read_manifest(folder: Path) -> Row:
    try:
        return dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError) as error:
        raise Refused(
            f"'{folder / MANIFEST}' cannot be read: unpack what `prepare` made, and use its {PACKED}"
        ) from error


def _rows(path: Path) -> list[Row]:
    """The results so far; a line that was cut off by a kill, or is damaged, is left out and measured again."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _named(step: Row) -> str:
    return " ".join(str(value) for value in step.values())


class Worker:
    """A process with PyTorch and TVM's runtime in it, and its conversation of lines of JSON."""

    def __init__(self, folder: Path, runtime: Sequence[Path]) -> None:
        read, write = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "measure", "--worker", str(write)]
        for each in runtime:
            command += ["--runtime", str(each)]
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "PYTHONUNBUFFERED": "1"}
        self._log = (folder / "worker.log").open("ab")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[write],
            env={**cache, **os.environ},
            start_new_session=True,
        )
        os.close(write)
        self._answers, self._rest = read, b""
        told = self._answer(120)
        if not told.get("ready"):
            self.end()
            raise Refused(told.get("refused") or f"the worker does not start: see {folder / 'worker.log'}")

    def ask(self, step: Row, seconds: float) -> Row:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended meanwhile, which its answer will say
            self._process.stdin.write(json.dumps(step).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Row:
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return {"error": f"not ready after {seconds:.0f} s", "lost": True, "again": seconds < STEP_SECONDS}
            data = os.read(self._answers, 65536)
            if not data:
                return {"error": f"its process ended with status {self._process.wait()}", "lost": True}
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))

    def end(self) -> None:
        """With all that it has started: compilers of PyTorch's are processes of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._answers)
        self._log.close()


# There: one step --------------------------------------------------------


def serve(folder: Path, manifest: Row, options: argparse.Namespace) -> int:
    with os.fdopen(options.worker, "w") as out:

        def tell(told: Row) -> None:
            out.write(json.dumps(told) + "\n")
            out.flush()

        import torch

        if manifest["kind"] == "cuda" and not torch.cuda.is_available():
            tell({"refused": "there is no NVIDIA GPU here that PyTorch can use: see with nvidia-smi what there is"})
            return 1
        bench = Bench(folder, manifest, [*options.runtime, folder / "runtime"])
        tell({"ready": True})
        for line in sys.stdin:
            try:
                tell(bench.step(json.loads(line)))
            except Exception as error:  # whatever a contender trips over is its row in the table
                words = (str(error).strip().splitlines() or [""])[0][:300]
                harmless = isinstance(error, Refused)  # else the GPU may answer nothing any more
                tell({"error": f"{type(error).__name__}: {words}", "lost": not harmless})
    return 0


class Bench:
    """One process's measurements."""

    def __init__(self, folder: Path, manifest: Row, runtime: Sequence[Path]) -> None:
        import torch

        self.folder, self.manifest, self._folders = folder, manifest, runtime
        self.device = torch.device("cuda" if manifest["kind"] == "cuda" else "cpu")
        self._known: Row = {}  # pictures and what float64 answers, of one model and batch
        sys.path.insert(0, str(folder))

    def step(self, step: Row) -> Row:
        import torch

        with torch.inference_mode():
            if step["contender"] == "limits":
                return self._limit(step["limit"])
            pictures, expected = self._expected(step["model"], step["batch"])
            set_arithmetic(step["dtype"])
            began = time.monotonic()
            call = getattr(self, f"_{step['contender'].replace('-', '_')}")(step, pictures)
            answers = [call(index).float().clone() for index in range(PICTURES)]
            ready = time.monotonic() - began
            error = max(_deviation(answer, each) for answer, each in zip(answers, expected, strict=True))
            if not error <= TOLERANCE[step["dtype"]]:
                return {"error": f"it is not timed, because it deviates from float64 by {error:.2g}"}
            return {"deviation": error, "ready_s": ready, **self._timed(call)}

    # Contenders: each gives a function from the number of a picture to the answer, on the device

    def _saevit_tvm(self, step: Row, pictures: Sequence[Any]) -> Callable[[int], Any]:
        entry = _artifact(self.manifest, step)
        assert entry is not None
        path = self.folder / entry["file"]
        if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise Refused(f"'{path}' is damaged: unpack it again")
        run = Program(self._folders, self.manifest["kind"], path)
        lent = [run.lend(picture) for picture in pictures]
        return lambda index: run(lent[index])

    _saevit_tvm_in_turn = _saevit_tvm

    def _torch(self, step: Row, pictures: Sequence[Any]) -> Callable[[int], Any]:
        module, given = self._module(step["model"], step["dtype"]), self._given(step, pictures)
        return lambda index: module(given[index])

    def _torch_graph(self, step: Row, pictures: Sequence[Any]) -> Callable[[int], Any]:
        """Eager, captured as a CUDA graph; on a CPU there is no such thing."""
        import torch

        if self.device.type != "cuda":
            raise Refused("CUDA graphs need CUDA")
        module, given = self._module(step["model"], step["dtype"]), self._given(step, pictures)
        still = given[0].clone()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                module(still)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = module(still)

        def call(index: int) -> Any:
            still.copy_(given[index])
            graph.replay()
            return answer

        return call

    def _torch_compile(self, step: Row, pictures: Sequence[Any]) -> Callable[[int], Any]:
        return self._compiled(step, pictures, "reduce-overhead")

    def _torch_compile_max(self, step: Row, pictures: Sequence[Any]) -> Callable[[int], Any]:
        return self._compiled(step, pictures, "max-autotune")

    def _compiled(self, step: Row, pictures: Sequence[Any], mode: str) -> Callable[[int], Any]:
        """With CUDA graphs (both modes have them), channels last, weights frozen."""
        import torch
        import torch._inductor.config as inductor

        torch._dynamo.reset()
        inductor.freezing = True
        last = torch.channels_last
        module = torch.compile(self._module(step["model"], step["dtype"]).to(memory_format=last), mode=mode)
        given = [each.contiguous(memory_format=last) for each in self._given(step, pictures)]

        def call(index: int) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return module(given[index])

        return call

    def _onnxruntime(self, step: Row, pictures: Sequence[Any]) -> Callable[[int], Any]:
        import onnxruntime
        import torch

        wanted = "CUDAExecutionProvider" if self.device.type == "cuda" else "CPUExecutionProvider"
        if wanted not in onnxruntime.get_available_providers():
            raise Refused(f"this onnxruntime has no {wanted}")
        if step["dtype"] not in ("float32", "tf32"):
            raise Refused("it is measured in float32 only")
        path = self.folder / f"{step['model']}-b{step['batch']}.onnx"
        if not path.exists():
            module = self._module(step["model"], "float32").cpu()
            torch.onnx.export(module, (pictures[0].cpu(),), str(path), dynamo=True)
        settings = {"use_tf32": str(int(step["dtype"] == "tf32"))} if self.device.type == "cuda" else {}
        session = onnxruntime.InferenceSession(str(path), providers=[(wanted, settings)])
        (name,) = (each.name for each in session.get_inputs())
        (result,) = (each.name for each in session.get_outputs())

        def call(index: int) -> Any:
            picture, answer = pictures[index], torch.empty_like(self._known["expected"][0], dtype=torch.float32)
            binding = session.io_binding()
            kind = self.device.type
            binding.bind_input(name, kind, 0, "float32", tuple(picture.shape), picture.data_ptr())
            binding.bind_output(result, kind, 0, "float32", tuple(answer.shape), answer.data_ptr())
            session.run_with_iobinding(binding)
            return answer

        return call

    def _module(self, model: str, dtype: str) -> Any:
        """PyTorch's own, with the weights of the artifacts."""
        import saevit
        import torch

        module = saevit.VARIANTS[model]().eval()
        if coarse_weights(module, self.manifest["seed"]) != self.manifest["models"][model]["weights"]:
            raise Refused("the weights made here are not those of the artifacts: this NumPy draws other numbers")
        stored = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
        return module.to(self.device, stored.get(dtype, torch.float32))

    def _given(self, step: Row, pictures: Sequence[Any]) -> list[Any]:
        dtype = next(self._module(step["model"], step["dtype"]).parameters()).dtype
        return [picture.to(dtype) for picture in pictures]

    def _expected(self, model: str, batch: int) -> tuple[list[Any], list[Any]]:
        """Pictures, fresh for every model and batch, and what float64 makes of them."""
        import torch

        if self._known.get("of") != (model, batch):
            self._known.clear()
            size = self.manifest["image_size"]
            draw = torch.Generator().manual_seed(hash((SEED, batch)) % 2**31)
            pictures = [torch.randn(batch, 3, size, size, generator=draw).to(self.device) for _ in range(PICTURES)]
            module = self._module(model, "float64")
            # In parts: a batch of 256 in float64 would be much for a small GPU.
            expected = [torch.cat([module(part.double()) for part in each.split(32)]) for each in pictures]
            self._known = {"of": (model, batch), "pictures": pictures, "expected": expected}
        return self._known["pictures"], self._known["expected"]

    # Time

    def _timed(self, call: Callable[[int], Any]) -> Row:
        """Single inferences, each waited for, and many in a row; in milliseconds."""
        clock = EventClock() if self.device.type == "cuda" else WallClock()
        once = clock.ms(lambda: call(0), 1)
        for index in range(max(3, min(50, int(200 / once)))):
            call(index % PICTURES)
        count = max(10, min(1000, int(1000 / once)))
        single = sorted(clock.ms(lambda index=index: call(index % PICTURES), 1) for index in range(count))
        many = max(2, min(100, int(100 / once)))
        rows = [clock.ms(lambda: [call(index % PICTURES) for index in range(many)], many) for _ in range(5)]
        return {
            "median_ms": statistics.median(single),
            "p10_ms": single[count // 10],
            "p90_ms": single[count * 9 // 10],
            "in_a_row_ms": statistics.median(rows),
            "runs": count,
            "machine": self._machine(),
        }

    def _machine(self) -> Row:
        import torch

        if self.device.type != "cuda":
            return {"device": platform.machine(), "torch": torch.__version__}
        told = torch.cuda.get_device_properties(0)
        return {"device": told.name, "torch": torch.__version__, "cuda": torch.version.cuda}

    def _limit(self, name: str) -> Row:
        """What this device reaches: bytes read and written a second in a copy, operations a second in a product."""
        import torch

        clock = EventClock() if self.device.type == "cuda" else WallClock()
        large = self.device.type == "cuda"
        if name == "copy":
            source = torch.randn(1 << (28 if large else 22), device=self.device)
            into, work, unit = torch.empty_like(source), 2 * source.numel() * 4, "GB/s"
            call = lambda: into.copy_(source)  # noqa: E731
        else:
            set_arithmetic(name)
            stored = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)
            size = 8192 if large else 512
            one, other = (torch.randn(size, size, device=self.device).to(stored) for _ in range(2))
            work, unit = 2 * size**3, "GFLOP/s"
            call = lambda: one @ other  # noqa: E731
        for _ in range(3):
            call()
        took = statistics.median(clock.ms(call, 1) for _ in range(15))
        return {"rate": work / took / 1e6, "unit": unit, "machine": self._machine()}


def set_arithmetic(dtype: str) -> None:
    """float32 with full mantissas, unless tf32 is what is asked for."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.benchmark = True


def _deviation(answer: Any, expected: Any) -> float:
    error = (answer.double() - expected).norm() / expected.norm()
    return float(error) if float(error) == float(error) else float("inf")


class EventClock:
    """Milliseconds on the GPU, between events on the stream that everyone computes on."""

    def ms(self, call: Callable[[], Any], count: int) -> float:
        import torch

        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / count


class WallClock:
    def ms(self, call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start) / count


class Program:
    """An artifact's program on the device: PyTorch's tensors in, a tensor of PyTorch's out, nothing copied."""

    def __init__(self, folders: Sequence[Path], kind: str, library: Path) -> None:
        import offline

        self._offline = offline
        self._runtime = runtime = _runtime(offline, folders, kind)
        module = runtime.module(library)
        machine = runtime.method(module, "vm_load_executable")()
        pooled, devices = 2, [runtime.device, *([1] if kind != "llvm" else [])]
        runtime.method(machine, "vm_initialization")(*(number for each in devices for number in (each, 0, pooled)))
        self._main = runtime.method(machine, "main")
        self._keep = module, machine

    def lend(self, tensor: Any) -> Any:
        """TVM's view of a tensor of PyTorch's."""
        import torch.utils.dlpack

        capsule, handle = torch.utils.dlpack.to_dlpack(tensor), ctypes.c_void_p()
        managed = _python("PyCapsule_GetPointer", ctypes.c_void_p)(ctypes.py_object(capsule), b"dltensor")
        if self._runtime.ffi.TVMFFITensorFromDLPack(ctypes.c_void_p(managed), 0, 1, ctypes.byref(handle)):
            raise RuntimeError("TVM does not take PyTorch's tensor")
        _python("PyCapsule_SetName", ctypes.c_int)(ctypes.py_object(capsule), b"used_dltensor")
        return self._offline.Object(self._runtime, handle.value or 0)

    def __call__(self, picture: Any) -> Any:
        import torch.utils.dlpack

        managed = ctypes.c_void_p()
        result = self._main(picture)
        if self._runtime.ffi.TVMFFITensorToDLPack(ctypes.c_void_p(result.handle), ctypes.byref(managed)):
            raise RuntimeError("PyTorch does not get TVM's tensor")
        capsule = _python("PyCapsule_New", ctypes.py_object)(managed, b"dltensor", None)
        return torch.utils.dlpack.from_dlpack(capsule)


_loaded: Row = {}


def _runtime(offline: Any, folders: Sequence[Path], kind: str) -> Any:
    """One for the process."""
    if "runtime" not in _loaded:
        _loaded["runtime"] = offline.Runtime(offline.runtime_folders(folders, Path(__file__).resolve().parent), kind)
    return _loaded["runtime"]


def _python(name: str, result: Any) -> Any:
    function = getattr(ctypes.pythonapi, name)
    function.restype = result
    return function


# There or here: telling -------------------------------------------------


def table(_options: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parent
    print(_table(_read_manifest(folder), _rows(folder / RESULTS), folder))
    return 0


def _table(manifest: Row, rows: Sequence[Row], folder: Path) -> str:
    """The results so far, also as a file."""
    limits = [f"{r['step']['limit']} {r['rate']:.0f} {r['unit']}" for r in rows if "rate" in r]
    lines = [f"Reached here: {', '.join(limits) or 'not measured'}.", ""]
    columns = ["model", "batch", "arithmetic", "contender", "ms", "p10", "p90", "in a row", "ours / its"]
    columns += ["deviation", "remarks"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    timed = {json.dumps(row["step"], sort_keys=True): row for row in rows}
    for row in sorted((row for row in rows if "model" in row["step"]), key=_place):
        step = row["step"]
        head = f"| {step['model']} | {step['batch']} | {step['dtype']} | {step['contender']} |"
        if "error" in row:
            lines.append(f"{head} | | | | | | {row['error']} |")
            continue
        ours = timed.get(json.dumps({**step, "contender": OURS}, sort_keys=True), {}).get("median_ms")
        ratio = f"{ours / row['median_ms']:.2f}" if ours else ""
        cells = [f"{row[key]:.4g}" for key in ("median_ms", "p10_ms", "p90_ms", "in_a_row_ms")]
        lines.append(f"{head} {' | '.join(cells)} | {ratio} | {row['deviation']:.1e} | {_remark(manifest, row)} |")
    text = "\n".join(lines) + "\n"
    (folder / TABLE).write_text(text)
    return text


def _place(row: Row) -> tuple[Any, ...]:
    step = row["step"]
    return step["model"], step["batch"], step["dtype"], CONTENDERS.index(step["contender"])


def _remark(manifest: Row, row: Row) -> str:
    """Ours: launches, and what of memory and arithmetic was reached; the bytes are what kernels read and write."""
    entry = _artifact(manifest, row["step"])
    if entry is None or "launches" not in entry:
        return f"ready after {row['ready_s']:.0f} s"
    seconds = row["in_a_row_ms"] / 1e3
    rates = f"{entry['bytes'] / seconds / 1e9:.0f} GB/s, {entry['float_ops'] / seconds / 1e9:.0f} GFLOP/s"
    return f"{entry['launches']} launches, {rates}"


if __name__ == "__main__":
    sys.exit(main())
