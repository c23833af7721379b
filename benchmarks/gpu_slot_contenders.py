"""What is compared on the GPU, each in the process of a worker: it needs PyTorch, and not even NumPy.

A worker makes a contender ready (loads or compiles it, and compares it with float64), times it when it is its turn, and
keeps it until another model, batch or arithmetic is asked for.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS, IN_TURN = "saevit-tvm", "saevit-tvm-in-turn"  # the other: no kernel begins while the one before it ends
MAX = "torch-compile-max"
CONTENDERS = (OURS, IN_TURN, "torch", "torch-graph", "torch-compile", MAX)
LIMITS = ("copy", "float32", "tf32", "float16", "bfloat16")
# Deviations from float64, by norms, that a contender may have in each arithmetic.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}
PICTURES = 3  # different inputs, in turns
RUNS, ROWS = 1000, 5  # the most single inferences of a turn, and rows of them
ROW_MS = 100


class Refused(Exception):
    """Why it cannot go on, in one sentence."""


def coarse_weights(module: Any, seed: int) -> str:
    """Random weights with few digits, the same on every machine, and their digest.

    Few digits, so that many libraries full of them can be packed small; BatchNorm's factors are powers of two, so that
    they stay few when it is folded.
    """
    import torch

    stream, digest = random.Random(seed), hashlib.sha256()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            drawn = torch.frombuffer(bytearray(stream.randbytes(tensor.numel())), dtype=torch.uint8)
            levels = (drawn.reshape(tensor.shape).float() % 31 - 15) / 16
            if name.endswith("running_var"):
                values = torch.full_like(levels, 1 - 1e-5)
            elif tensor.dim() > 1 and tensor[0].numel() > 1 and "gain" not in name:
                values = levels * 2.0 ** _exponent(3 / tensor[0].numel())
            elif name.endswith("weight"):  # the factors of a normalisation
                values = torch.where(levels > 0, 1.0, 0.5)
            else:
                values = levels / 4
            tensor.copy_(values)
            digest.update(ctypes.string_at(tensor.data_ptr(), 4 * tensor.numel()))
    return digest.hexdigest()


def _exponent(square: float) -> int:
    """Of the greatest power of two that is not above the root."""
    exponent = 0
    while 4.0**exponent > square:
        exponent -= 1
    return exponent


# The worker -------------------------------------------------------------------


def serve(folder: Path, manifest: Row, runtime: Sequence[Path], descriptor: int, rehearsed: bool) -> int:
    """Orders come in on stdin and answers go out, as lines of JSON."""
    with os.fdopen(descriptor, "w") as out:

        def tell(told: Row) -> None:
            out.write(json.dumps(told) + "\n")
            out.flush()

        import torch

        if manifest["kind"] == "cuda" and not rehearsed and not torch.cuda.is_available():
            tell({"refused": "there is no NVIDIA GPU here that PyTorch can use: see with nvidia-smi what there is"})
            return 1
        bench = Bench(folder, manifest, runtime, rehearsed)
        tell({"machine": bench.machine()})
        for line in sys.stdin:
            try:
                tell(bench.done(json.loads(line)))
            except Refused as error:
                tell({"error": str(error)})
            except Exception as error:  # whatever a contender trips over is its row in the table
                words = (str(error).strip().splitlines() or [""])[0][:300]
                tell({"error": f"{type(error).__name__}: {words}", "lost": True})  # the GPU may answer nothing any more
    return 0


class Bench:
    """One process's measurements."""

    def __init__(self, folder: Path, manifest: Row, runtime: Sequence[Path], rehearsed: bool) -> None:
        import torch

        self.folder, self.manifest, self._folders = folder, manifest, [*runtime, folder / "runtime"]
        self.device = torch.device("cuda" if manifest["kind"] == "cuda" and not rehearsed else "cpu")
        self._group: tuple[Any, ...] = ()
        self._ready: dict[str, Callable[[int], Any]] = {}
        self._pictures: list[Any] = []
        self._expected: list[Any] = []
        sys.path.insert(0, str(folder))

    def machine(self) -> Row:
        import torch

        told: Row = {"torch": torch.__version__, "python": platform.python_version()}
        if self.device.type != "cuda":
            return {"card": platform.machine(), **told}
        card = torch.cuda.get_device_properties(0)
        told |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return {"card": card.name, "multiprocessors": card.multi_processor_count, **told}

    def done(self, order: Row) -> Row:
        import torch

        with torch.inference_mode():
            if order["do"] == "limit":
                return self._limit(order["name"])
            self._enter(order)
            told = self._made_ready(order) if order["contender"] not in self._ready else {}
            done = order["do"] == "check" or "error" in told
            return told if done else told | self._timed(self._ready[order["contender"]])

    def _enter(self, order: Row) -> None:
        """Pictures, fresh for every model and batch, and what float64 makes of them."""
        import torch

        group = order["model"], order["batch"], order["dtype"]
        set_arithmetic(order["dtype"])
        if group == self._group:
            return
        self._ready.clear()
        if group[:2] != self._group[:2]:
            size, batch = self.manifest["image_size"], order["batch"]
            draw = torch.Generator().manual_seed(batch)
            pictures = [torch.randn(batch, 3, size, size, generator=draw).to(self.device) for _ in range(PICTURES)]
            module = self._module(order["model"], torch.float64)
            # In parts: a batch of 256 in float64 would be much for a small GPU.
            self._expected = [torch.cat([module(part.double()) for part in each.split(32)]) for each in pictures]
            self._pictures = pictures
        self._group = group

    def _made_ready(self, order: Row) -> Row:
        began = time.monotonic()
        call = getattr(self, f"_{order['contender'].replace('-', '_')}")(order)
        answers = [call(index).float().clone() for index in range(PICTURES)]
        took = time.monotonic() - began
        error = max(_deviation(answer, each) for answer, each in zip(answers, self._expected))  # noqa: B905
        if not error <= TOLERANCE[order["dtype"]]:
            return {"deviation": error, "error": f"it is not timed, because it deviates from float64 by {error:.2g}"}
        self._ready[order["contender"]] = call
        return {"deviation": error, "ready_s": took}

    # Contenders: each gives a function from the number of a picture to the answer, on the device

    def _saevit_tvm(self, order: Row) -> Callable[[int], Any]:
        entry = artifact(self.manifest, order)
        assert entry is not None
        path = self.folder / entry["file"]
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            raise Refused(f"'{path}' is damaged: unpack it again")
        run = Program(self._folders, self.manifest["kind"], path)
        if self.manifest["kind"] == "cuda" and self.device.type == "cpu":
            return self._rehearsed(run)
        lent = [run.lend(picture) for picture in self._pictures]
        return lambda index: run(lent[index])

    _saevit_tvm_in_turn = _saevit_tvm

    def _rehearsed(self, run: Program) -> Callable[[int], Any]:
        """Where PyTorch has no GPU, what TVM takes for one has memory of its own."""
        import torch

        given = [run.runtime.tensor("float32", tuple(picture.shape)) for picture in self._pictures]
        for there, picture in zip(given, self._pictures):  # noqa: B905  (Python 3.9)
            run.runtime.write(there, ctypes.string_at(picture.data_ptr(), 4 * picture.numel()))
        like = self._expected[0]

        def call(index: int) -> Any:
            data = run.runtime.read(run.main(given[index]), 4 * like.numel())
            return torch.frombuffer(data, dtype=torch.float32).reshape(like.shape)

        return call

    def _torch(self, order: Row) -> Callable[[int], Any]:
        module, given = self._channels_last(order)
        return lambda index: module(given[index])

    def _torch_graph(self, order: Row) -> Callable[[int], Any]:
        """Eager, captured as a CUDA graph; on a CPU there is no such thing."""
        import torch

        if self.device.type != "cuda":
            raise Refused("CUDA graphs need CUDA")
        module, given = self._channels_last(order)
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

    def _torch_compile(self, order: Row) -> Callable[[int], Any]:
        return self._compiled(order, "reduce-overhead")

    def _torch_compile_max(self, order: Row) -> Callable[[int], Any]:
        return self._compiled(order, "max-autotune")

    def _compiled(self, order: Row, mode: str) -> Callable[[int], Any]:
        """With CUDA graphs (both modes have them), weights frozen."""
        import torch
        import torch._inductor.config as inductor

        torch._dynamo.reset()
        inductor.freezing = True
        module, given = self._channels_last(order)
        module = torch.compile(module, mode=mode)

        def call(index: int) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return module(given[index])

        return call

    def _channels_last(self, order: Row) -> tuple[Any, list[Any]]:
        """PyTorch's own and its pictures, in the type and in the layout that it is fastest in."""
        import torch

        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(order["dtype"], torch.float32)
        last = torch.channels_last
        module = self._module(order["model"], dtype).to(memory_format=last)
        return module, [picture.to(dtype).contiguous(memory_format=last) for picture in self._pictures]

    def _module(self, model: str, dtype: Any) -> Any:
        """PyTorch's own, with the weights of the artifacts."""
        import saevit

        module = saevit.VARIANTS[model]().eval()
        if coarse_weights(module, self.manifest["seed"]) != self.manifest["models"][model]["weights"]:
            raise Refused("the weights made here are not those of the artifacts: unpack them again")
        return module.to(self.device, dtype)

    # Time

    def _timed(self, call: Callable[[int], Any]) -> Row:
        """Single inferences, each waited for, and many in a row; in milliseconds."""
        clock = EventClock() if self.device.type == "cuda" else WallClock()
        once = clock.ms(lambda: call(0), 1)
        for index in range(max(3, min(50, int(200 / once)))):
            call(index % PICTURES)
        count = max(10, min(RUNS, int(RUNS / once)))
        single = sorted(clock.ms(lambda index=index: call(index % PICTURES), 1) for index in range(count))
        many = max(2, min(ROW_MS, int(ROW_MS / once)))
        rows = [clock.ms(lambda: [call(index % PICTURES) for index in range(many)], many) for _ in range(ROWS)]
        return {
            "median_ms": statistics.median(single),
            "p10_ms": single[count // 10],
            "p90_ms": single[count * 9 // 10],
            "in_a_row_ms": statistics.median(rows),
            "runs": count,
        }

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
            size = 8192 if large else 256
            one, other = (torch.randn(size, size, device=self.device).to(stored) for _ in range(2))
            work, unit = 2 * size**3, "GFLOP/s"
            call = lambda: one @ other  # noqa: E731
        for _ in range(3):
            call()
        took = statistics.median(clock.ms(call, 1) for _ in range(15))
        return {"rate": work / took / 1e6, "unit": unit}


def artifact(manifest: Row, step: Row) -> Row | None:
    """Ours for a step, if there is one."""
    keys = ("contender", "model", "batch", "dtype")
    return next((each for each in manifest["artifacts"] if all(each[key] == step[key] for key in keys)), None)


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


# Ours -------------------------------------------------------------------------


class Program:
    """An artifact's program on the device: PyTorch's tensors in, a tensor of PyTorch's out, nothing copied."""

    def __init__(self, folders: Sequence[Path], kind: str, library: Path) -> None:
        import offline

        self._offline = offline
        self.runtime = runtime = _runtime(offline, folders, kind)
        module = runtime.module(library)
        machine = runtime.method(module, "vm_load_executable")()
        pooled, devices = 2, [runtime.device, *([1] if kind != "llvm" else [])]
        runtime.method(machine, "vm_initialization")(*(number for each in devices for number in (each, 0, pooled)))
        self.main = runtime.method(machine, "main")
        self._keep = module, machine

    def lend(self, tensor: Any) -> Any:
        """TVM's view of a tensor of PyTorch's."""
        import torch.utils.dlpack

        capsule, handle = torch.utils.dlpack.to_dlpack(tensor), ctypes.c_void_p()
        managed = _python("PyCapsule_GetPointer", ctypes.c_void_p)(ctypes.py_object(capsule), b"dltensor")
        if self.runtime.ffi.TVMFFITensorFromDLPack(ctypes.c_void_p(managed), 0, 1, ctypes.byref(handle)):
            raise RuntimeError("TVM does not take PyTorch's tensor")
        _python("PyCapsule_SetName", ctypes.c_int)(ctypes.py_object(capsule), b"used_dltensor")
        return self._offline.Object(self.runtime, handle.value or 0)

    def __call__(self, picture: Any) -> Any:
        import torch.utils.dlpack

        managed = ctypes.c_void_p()
        result = self.main(picture)
        if self.runtime.ffi.TVMFFITensorToDLPack(ctypes.c_void_p(result.handle), ctypes.byref(managed)):
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
