#!/usr/bin/env python3
"""Measures the compiled candidates beside this file, on a machine that has the device, Python 3.9 and TVM's runtime.

    python3 run.py [--seconds N] [--results FILE] [--runtime FOLDER]

Each result is on the disk before the next candidate begins (failures as soon as anything has worked); the same command
goes on after the last one, whatever ended it. A candidate that crashes or hangs costs a worker process and nothing
else. What a kernel computes is compared with what its reference beside it computes, on random numbers, into memory that
was filled with NaN.

This file travels alone: it needs neither the package that it is from, nor NumPy, nor the compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
WHAT = "saevit-tvm candidates"
MANIFEST, RESULTS, RUNTIME = "bundle.json", "results.jsonl", "runtime"

REPEATS = 5
REPEAT_MS = 20
LAUNCH_SECONDS = 2e-5  # that a call by itself may take beside its kernel
HOPELESS = 5.0  # so many times slower than the best of its kernel, one look is enough
CANDIDATE_SECONDS = 60.0
START_SECONDS = 120.0
UNPROVEN = 24  # failures with no success, after which it is the machine that is at fault
SAMPLES = 8191  # numbers of a result that are compared
BLOCK = 65521  # random numbers, again and again: a prime, so that no row begins like the last one


class Kind(NamedTuple):
    """A kind of target: TVM's number for its device, the libraries that bring it, and what shows which there are."""

    number: int
    libraries: tuple[str, ...] = ()
    look: str = ""
    nvidia: bool = False


KINDS = {
    "llvm": Kind(1),
    "cuda": Kind(2, ("libcudart.so.13", "libtvm_runtime_cuda.so"), "nvidia-smi", nvidia=True),
    "opencl": Kind(4, ("libsaevit_opencl.so",), "clinfo"),
}
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}  # DLPack's codes and bits


class Failure(Exception):
    """What is wrong, in one sentence."""


# TVM's runtime, by its stable C interface ------------------------------

_NONE, _INT, _BOOL, _FLOAT, _POINTER, _DTYPE, _DEVICE, _TEXT = 0, 1, 2, 3, 4, 5, 6, 8
_SMALL_TEXT, _SMALL_BYTES, _FIRST_OBJECT, _TEXT_OBJECT, _BYTES_OBJECT = 11, 12, 64, 65, 66
_HEADER = 24  # of an object: reference counts, type index, deleter


class _Value(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("length", ctypes.c_uint32), ("bits", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Device(int):
    """An argument: the first device of a kind."""


class Dtype(str):
    """An argument: a type of numbers."""


class Pointer(int):
    """An argument: an address."""


class Object:
    """A reference to an object of TVM's; a function can be called."""

    def __init__(self, runtime: Runtime, handle: int) -> None:
        self.runtime, self.handle = runtime, handle

    def __del__(self) -> None:
        self.runtime.ffi.TVMFFIObjectDecRef(self.handle)

    def __call__(self, *arguments: Any) -> Any:
        return self.runtime.call(self.handle, arguments)


class Runtime:
    """libtvm_ffi and libtvm_runtime, and the part of the runtime for a kind of device."""

    def __init__(self, folders: Sequence[Path], kind: str) -> None:
        self._folders, self.kind = list(folders), KINDS[kind]
        self.device = self.kind.number
        self.cudart: Any = None
        self.ffi = self._load("libtvm_ffi.so")
        self.ffi.TVMFFIObjectDecRef.argtypes = [ctypes.c_void_p]
        self.ffi.TVMFFIFunctionCall.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
        self._load("libtvm_runtime.so")
        for name in self.kind.libraries:
            self._load(name)
        if self.kind.nvidia:
            self.cudart = ctypes.CDLL(None)  # as TVM's own calls find it: one that was preloaded comes first

    def _load(self, name: str) -> ctypes.CDLL:
        path = next((str(folder / name) for folder in self._folders if (folder / name).is_file()), name)
        try:
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL | getattr(os, "RTLD_NODELETE", 0))
        except OSError as error:
            raise Failure(
                f"TVM's runtime cannot be loaded ({error}): install the machine's driver, and give the folder of "
                f"{name} with --runtime, or export the candidates with --with-runtime."
            ) from error

    def function(self, name: str) -> Object:
        """What TVM's runtime registers under this name."""
        text = ctypes.create_string_buffer(name.encode())
        key, handle = _Bytes(ctypes.addressof(text), len(name)), ctypes.c_void_p()
        if self.ffi.TVMFFIFunctionGetGlobal(ctypes.byref(key), ctypes.byref(handle)) or not handle.value:
            raise Failure(f"the TVM runtime has no '{name}': use the version that the candidates were exported with.")
        return Object(self, handle.value)

    def call(self, handle: int, arguments: Sequence[Any]) -> Any:
        keep: list[Any] = []
        values = (_Value * len(arguments))(*(self._value(each, keep) for each in arguments))
        result = _Value()
        if self.ffi.TVMFFIFunctionCall(handle, values, len(arguments), ctypes.byref(result)):
            raise self._raised()
        return self._taken(result)

    def _value(self, argument: Any, keep: list[Any]) -> _Value:
        if argument is None:
            return _Value(_NONE, 0, 0)
        if isinstance(argument, Object):
            return _Value(ctypes.c_int32.from_address(argument.handle + 8).value, 0, argument.handle)
        if isinstance(argument, Dtype):
            code, bits = _DTYPES[argument]
            return _Value(_DTYPE, 0, code | bits << 8 | 1 << 16)
        if isinstance(argument, Device):
            return _Value(_DEVICE, 0, int(argument))
        if isinstance(argument, str):
            keep.append(ctypes.create_string_buffer(argument.encode()))
            return _Value(_TEXT, 0, ctypes.addressof(keep[-1]))
        if isinstance(argument, bool):
            return _Value(_BOOL, 0, argument)
        return _Value(_POINTER if isinstance(argument, Pointer) else _INT, 0, int(argument))

    def _taken(self, value: _Value) -> Any:
        if value.kind in (_SMALL_TEXT, _SMALL_BYTES):
            found = struct.pack("<q", value.bits)[: value.length]
            return found.decode(errors="replace") if value.kind == _SMALL_TEXT else found
        if value.kind in (_TEXT_OBJECT, _BYTES_OBJECT):
            held = Object(self, value.bits)
            cell = _Bytes.from_address(held.handle + _HEADER)
            found = ctypes.string_at(cell.data, cell.size)
            return found.decode(errors="replace") if value.kind == _TEXT_OBJECT else found
        if value.kind >= _FIRST_OBJECT:
            return Object(self, value.bits)
        return None if value.kind == _NONE else value.bits

    def _raised(self) -> Exception:
        handle = ctypes.c_void_p()
        self.ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
        error = Object(self, handle.value or 0)
        cells = (_Bytes * 2).from_address(error.handle + _HEADER)
        kind, message = (ctypes.string_at(cell.data, cell.size).decode(errors="replace") for cell in cells)
        return RuntimeError(f"{kind}: {' '.join(message.split())}")

    # What is done with it

    def module(self, path: Path) -> Object:
        return self.function("ffi.ModuleLoadFromFile")(str(path))

    def method(self, module: Object, name: str) -> Object:
        return self.function("ffi.ModuleGetFunction")(module, name, False)

    def tensor(self, dtype: str, shape: Sequence[int]) -> Object:
        extents = self.function("ffi.Shape")(*shape)
        return self.function("runtime.TVMTensorAllocWithScope")(extents, Dtype(dtype), Device(self.device), None)

    def write(self, tensor: Object, data: bytes) -> None:
        address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        self.function("runtime.TVMTensorCopyFromBytes")(tensor, Pointer(address), len(data))

    def read(self, tensor: Object, size: int) -> bytearray:
        data = bytearray(size)
        address = ctypes.addressof((ctypes.c_char * size).from_buffer(data))
        self.function("runtime.TVMTensorCopyToBytes")(tensor, Pointer(address), size)
        return data

    def attribute(self, number: int) -> Any:
        """What the device says of itself, by TVM's number for the question; None where it does not."""
        try:
            return self.function("runtime.GetDeviceAttr")(self.device, 0, number)
        except RuntimeError:
            return None

    def exists(self) -> bool:
        return bool(self.attribute(0))

    def synchronize(self) -> None:
        self.function("runtime.Device_StreamSync")(Device(self.device), 0)

    def evaluated(self, module: Object, arguments: Sequence[Object], number: int, repeat: int, ms: int) -> list[float]:
        """Seconds a call by TVM's own timer, one number a repeat."""
        settings = (self.device, 0, number, repeat, ms, 100, 0, 1, 0, "")
        timed = self.function("runtime.RPCTimeEvaluator")(module, "main", *settings)
        return list(struct.unpack(f"={repeat}d", timed(*arguments)))


class Graph:
    """Launches as an artifact makes them: recorded once as a CUDA graph, and replayed.

    A launch by itself costs the CPU several microseconds, more than many a kernel takes; in a graph it is the GPU's.
    """

    RELAXED, NON_BLOCKING, CUDA = 2, 1, 2

    def __init__(self, ffi: Any, cudart: Any) -> None:
        self._ffi, self._cudart = ffi, cudart
        ffi.TVMFFIEnvSetStream.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
        self._stream = ctypes.c_void_p()
        self._do("cudaStreamCreateWithFlags", ctypes.byref(self._stream), self.NON_BLOCKING)
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            self._do("cudaEventCreate", ctypes.byref(event))

    def seconds(self, call: Callable[[], Any], estimate: float, repeats: int, repeat_ms: float) -> list[float]:
        """Seconds a call: of each repeat the median of its replays."""
        launches = max(4, min(64, int(1e-3 / max(estimate, 1e-7))))
        graph = self._recorded(call, launches)
        executable = ctypes.c_void_p()
        try:
            self._do("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
            self._replay(executable)
            once = self._replay(executable)
            replays = max(3, min(200, int(1e-3 * repeat_ms / max(once, 1e-6))))
            found = [statistics.median(self._replay(executable) for _ in range(replays)) for _ in range(repeats)]
        finally:
            if executable:
                self._cudart.cudaGraphExecDestroy(executable)
            self._cudart.cudaGraphDestroy(graph)
        return [each / launches for each in found]

    def _recorded(self, call: Callable[[], Any], launches: int) -> ctypes.c_void_p:
        graph, before = ctypes.c_void_p(), ctypes.c_void_p()
        self._ffi.TVMFFIEnvSetStream(self.CUDA, 0, self._stream, ctypes.byref(before))
        try:
            self._do("cudaStreamBeginCapture", self._stream, self.RELAXED)
            try:
                for _ in range(launches):
                    call()
            finally:
                status = self._cudart.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        finally:
            self._ffi.TVMFFIEnvSetStream(self.CUDA, 0, before, None)
        if status:
            raise RuntimeError(f"cudaStreamEndCapture failed with status {status}")
        return graph

    def _replay(self, executable: ctypes.c_void_p) -> float:
        start, stop = self._events
        self._do("cudaEventRecord", start, self._stream)
        self._do("cudaGraphLaunch", executable, self._stream)
        self._do("cudaEventRecord", stop, self._stream)
        self._do("cudaEventSynchronize", stop)
        took = ctypes.c_float()
        self._do("cudaEventElapsedTime", ctypes.byref(took), start, stop)
        return 1e-3 * took.value

    def _do(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._cudart, name)(*arguments):
            self._cudart.cudaGetLastError()  # or the next call would report it again
            raise RuntimeError(f"{name} failed with status {status}")


# Numbers ----------------------------------------------------------------


def numbers(dtype: str, count: int, seed: str) -> bytes:
    """Random numbers between -1 and 1, the same for the same seed."""
    stream = random.Random(seed)
    block = [stream.uniform(-1.0, 1.0) for _ in range(min(count, BLOCK))]
    data = packed(dtype, block)
    return (data * -(-count // BLOCK))[: count * SIZES[dtype]]


def packed(dtype: str, values: Sequence[float]) -> bytes:
    if dtype == "float16":
        return struct.pack(f"<{len(values)}e", *values)
    data = struct.pack(f"<{len(values)}f", *values)
    return data if dtype == "float32" else b"".join(data[at + 2 : at + 4] for at in range(0, len(data), 4))


def sampled(dtype: str, data: bytes | bytearray) -> list[float]:
    """Some of the numbers, spread evenly."""
    stored = memoryview(data).cast("I" if SIZES[dtype] == 4 else "H")
    few = stored[:: 1 + len(stored) // SAMPLES]
    if dtype == "bfloat16":
        return list(struct.unpack(f"={len(few)}f", struct.pack(f"={len(few)}I", *(each << 16 for each in few))))
    return list(struct.unpack(f"={len(few)}{'f' if dtype == 'float32' else 'e'}", few.tobytes()))


def deviation(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference, relative to the largest number that is expected, or to 1; infinite for NaN."""
    worst = max((abs(a - b) for a, b in zip(found, expected)), default=0.0)  # noqa: B905  (Python 3.9)
    whole = all(a - a == 0 for a in found)
    return worst / max(1.0, max(map(abs, expected), default=1.0)) if whole else float("inf")


# The worker: one candidate after the other ------------------------------


class Worker:
    """Runs candidates in a process that is expendable."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self.bundle, self.runtime = bundle, runtime
        self._expected: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}
        self._graph = Graph(runtime.ffi, runtime.cudart) if runtime.kind.nvidia else None

    def result(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """The times of a candidate; a RuntimeError says what is wrong with it."""
        arguments = [(str(dtype), [int(extent) for extent in shape]) for dtype, shape in candidate["arguments"]]
        kernel = candidate["kernel"]
        tensors = self._tensors(kernel, arguments)
        reference = self.bundle.manifest["kernels"][kernel]["reference"]
        if reference and kernel not in self._expected:
            self._expected[kernel] = self._answer(self.bundle.library(reference), tensors, arguments[-1])[1]
        module, answer = self._answer(self.bundle.library(candidate), tensors, arguments[-1])
        error = deviation(answer, self._expected[kernel]) if reference else None
        tolerance = float(self.bundle.manifest["tolerance"])
        if error is not None and not error <= tolerance:
            raise RuntimeError(
                f"its result deviates from the reference's by {error:.3g}, where {tolerance:g} is allowed"
            )
        seconds, timer = self._timed(module, tensors, self._best.get(kernel, float("inf")))
        self._best[kernel] = min([*seconds, self._best.get(kernel, float("inf"))])
        return {"run_secs": seconds, "timer": timer, "error": error}

    def _tensors(self, kernel: str, arguments: Sequence[tuple[str, list[int]]]) -> list[Object]:
        tensors = []
        for index, (dtype, shape) in enumerate(arguments[:-1]):
            tensors.append(self.runtime.tensor(dtype, shape))
            self.runtime.write(tensors[-1], numbers(dtype, _product(shape), f"{kernel} {index}"))
        return [*tensors, self.runtime.tensor(*arguments[-1])]

    def _answer(
        self, library: Path, tensors: Sequence[Object], out: tuple[str, list[int]]
    ) -> tuple[Object, list[float]]:
        """The loaded kernel, and some of what it writes into memory that is full of NaN."""
        dtype, size = out[0], SIZES[out[0]] * _product(out[1])
        self.runtime.write(tensors[-1], b"\xff" * size)
        module = self.runtime.module(library)
        self.runtime.method(module, "main")(*tensors)
        self.runtime.synchronize()
        data = self.runtime.read(tensors[-1], size)
        if data.find(b"\xff" * SIZES[dtype]) >= 0:
            raise RuntimeError("it leaves numbers of its result unwritten, or computes NaN")
        return module, sampled(dtype, data)

    def _timed(self, module: Object, tensors: Sequence[Object], best: float) -> tuple[list[float], str]:
        (once,) = self.runtime.evaluated(module, tensors, 1, 1, 0)
        if once > HOPELESS * best + LAUNCH_SECONDS:
            return [once], "evaluator"
        if self._graph is not None:
            main = self.runtime.method(module, "main")
            with contextlib.suppress(RuntimeError):  # without graphs there still is TVM's own timer
                return self._graph.seconds(lambda: main(*tensors), once, REPEATS, REPEAT_MS), "graph"
        return self.runtime.evaluated(module, tensors, 1, REPEATS, REPEAT_MS), "evaluator"


def _product(extents: Sequence[int]) -> int:
    count = 1
    for extent in extents:
        count *= extent
    return count


def machine(runtime: Runtime) -> dict[str, Any]:
    """What measures: comparable, and tellable apart when stores are merged, but without the machine's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    answer = {
        "id": hashlib.sha256(platform.node().encode()).hexdigest()[:8],
        "cpu": found.group(1) if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if runtime.kind.look:
        answer["device"] = str(runtime.attribute(5))
        driver = _nvidia_driver() if runtime.kind.nvidia else runtime.attribute(12)
        answer.update({"driver": str(driver)} if driver else {})
    if runtime.kind.nvidia:
        answer["capability"] = str(runtime.attribute(4))
    return answer


def _nvidia_driver() -> str | None:
    """The driver's version, as its management library says it."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text)):
        return None
    return text.value.decode(errors="replace")


def _require_device(runtime: Runtime, target: dict[str, Any]) -> None:
    if not runtime.exists():
        raise Failure(
            f"there is no GPU here, or its driver does not start: see with {runtime.kind.look} what there is."
        )
    if not runtime.kind.nvidia:
        return
    have = int(str(runtime.attribute(4)).replace(".", ""))
    want = int(str(target["tvm"]["arch"]).removeprefix("sm_"))
    if have // 10 != want // 10 or have < want:
        raise Failure(f"the candidates are for sm_{want}, and the GPU here, {runtime.attribute(5)}, is sm_{have}.")


def serve(bundle: Bundle, folders: Sequence[Path], descriptor: int) -> None:
    """The worker's end of the conversation: indices come in on stdin, answers go out as lines of JSON."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # do not outlive the parent
    with os.fdopen(descriptor, "w") as out:

        def say(**answer: Any) -> None:
            out.write(json.dumps(answer) + "\n")
            out.flush()

        try:
            runtime = Runtime(folders, bundle.kind)
            _require_device(runtime, bundle.manifest["target"])
            worker = Worker(bundle, runtime)
            say(machine=machine(runtime))
        except (Failure, RuntimeError) as error:
            say(refused=str(error))
            return
        for line in sys.stdin:
            try:
                say(result=worker.result(bundle.manifest["candidates"][int(line)]))
            except Failure as error:
                say(refused=str(error))
                return
            except RuntimeError as error:
                say(failure="run failed", words=str(error)[:600])


class Child:
    """The parent's end: a worker, replaced by a new one when it is lost."""

    def __init__(self, bundle: Bundle, folders: Sequence[Path]) -> None:
        self._bundle, self._folders = bundle, folders
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        self.machine: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._errors.close()

    def start(self) -> None:
        """Raises Failure where no worker can start."""
        read, write = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(write)]
        command += ["--bundle", str(self._bundle.folder)]
        for folder in self._folders:
            command += ["--runtime", str(folder)]
        threads = self._bundle.manifest["target"]["tvm"].get("num-cores")
        environment = {**os.environ, **({"TVM_NUM_THREADS": str(threads)} if threads else {})}
        self._errors.truncate(0)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=[write],
            env=environment,
            start_new_session=True,
        )
        os.close(write)
        self._answers, self._rest = read, b""
        answer = self._answer(START_SECONDS)
        if "machine" not in answer:
            raise Failure(answer.get("refused") or f"the worker does not start: {answer.get('words')}")
        self.machine = answer["machine"]

    def measure(self, index: int) -> dict[str, Any]:
        """What became of a candidate."""
        if self._process is None:
            self.start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"%d\n" % index)
            self._process.stdin.flush()
        answer = self._answer(CANDIDATE_SECONDS)
        if "refused" in answer:
            raise Failure(answer["refused"])
        if "result" not in answer:
            self._end()  # after many an error a GPU answers nothing any more in that process
        return answer.get("result") or {"failure": answer["failure"], "words": answer["words"]}

    def _answer(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return {"failure": "run timed out", "words": f"it took more than {seconds:.0f} s"}
            data = os.read(self._answers, 65536)
            if not data:
                return {"failure": "run crashed", "words": self._last_words()}
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        ending = f"killed by signal {-status}" if status < 0 else f"status {status}"
        return f"{lines[-1][:500]}; {ending}" if lines else ending

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        os.close(self._answers)
        self._process = None


# The bundle and its results ---------------------------------------------


class Bundle:
    """The folder that this file lies in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.text = (folder / MANIFEST).read_text()
            self.manifest: dict[str, Any] = json.loads(self.text)
        except (OSError, ValueError) as error:
            raise Failure(
                f"'{folder / MANIFEST}' cannot be read: unpack the whole file of candidates again."
            ) from error
        if self.manifest.get("what") != WHAT or self.manifest.get("format") != FORMAT:
            raise Failure(f"'{folder / MANIFEST}' is of another format: use the run.py that came with it.")
        self.digest = digest(self.text)
        self.kind = str(self.manifest["target"]["kind"])

    def library(self, entry: dict[str, Any]) -> Path:
        path = self.folder / entry["file"]
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            found = ""
        if found != entry["sha256"]:
            raise Failure(f"'{path}' is missing or damaged: unpack the whole file of candidates again.")
        return path


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def encoded(record: dict[str, Any]) -> bytes:
    """A line of results, with a checksum before it."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return b'{"check":"' + hashlib.sha256(body).hexdigest()[:16].encode() + b'","record":' + body + b"}\n"


def decoded(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, or None for anything else."""
    body = line[len(b'{"check":"","record":') + 16 : -2]
    try:
        record = json.loads(body)
        return record if isinstance(record, dict) and encoded(record) == line else None
    except (ValueError, RecursionError):  # also of numbers that are none, which are never written
        return None


class Results:
    """The file of results: the bundle's manifest first, then what was found out, each line whole when it is there."""

    def __init__(self, path: Path, bundle: Bundle) -> None:
        self.path, self.done = path, set[int]()
        try:
            self._file = path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(f"'{path}' is being written by another run.py: wait for it, or end it.") from error
        except OSError as error:
            raise Failure(
                f"'{path}' cannot be written ({error.strerror}): give another file with --results."
            ) from error
        self._file.seek(0)
        whole = self._file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        first = decoded(lines[0]) if lines else None
        if lines and (first is None or first.get("bundle") != bundle.digest):
            raise Failure(f"'{path}' has the results of other candidates: give another file with --results.")
        self._file.truncate(len(whole))  # a line that was cut off is measured again
        if not lines:
            self.add({"kind": "bundle", "bundle": bundle.digest, "manifest": bundle.text})
        for record in filter(None, map(decoded, lines)):
            if record["kind"] == "result":
                self.done.add(record["candidate"])

    def add(self, record: dict[str, Any]) -> None:
        """The line is on the disk when this returns."""
        try:
            self._file.write(encoded(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # of what is still to be written
                self._file.close()
            raise Failure(f"'{self.path}' cannot be written ({error.strerror}): the same command goes on.") from error
        if record["kind"] == "result":
            self.done.add(record["candidate"])


def measure_all(bundle: Bundle, results: Results, child: Child, seconds: float | None) -> Iterator[dict[str, Any]]:
    """Each candidate that has no result yet, in order, and what became of it.

    Failures wait for the first success: without one they may be the machine's fault, and are not kept.
    """
    candidates = bundle.manifest["candidates"]
    todo = [index for index, each in enumerate(candidates) if index not in results.done]
    if not todo:
        return
    end = None if seconds is None else time.monotonic() + seconds
    child.start()
    results.add({"kind": "run", "machine": child.machine, "python": platform.python_version(), "time": now()})
    proven, waiting = False, []
    for index in todo:
        if end is not None and time.monotonic() > end:
            break
        answer = child.measure(index)
        record = {"kind": "result", "candidate": index, "run_secs": [], "failure": None, "words": None, **answer}
        waiting.append({**record, "time": now()})
        proven = proven or bool(record["run_secs"])
        if proven:
            for each in waiting:
                results.add(each)
            waiting = []
        elif len(waiting) >= UNPROVEN:
            break
        yield record
    if waiting:
        raise Failure(f"none of {len(waiting)} candidates could be measured; the last one's words: {answer['words']}")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def runtime_folders(given: Sequence[Path], bundle: Path) -> list[Path]:
    """Where the runtime's libraries may be: as asked for, in the bundle, or in the installed wheels."""
    folders = [*given, bundle / RUNTIME]
    for package in ("tvm_ffi", "tvm"):
        spec = importlib.util.find_spec(package)
        folders += [Path(place) / "lib" for place in (spec.submodule_search_locations or [])] if spec else []
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="begin no candidate after so long")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS} beside this file")
    parser.add_argument("--runtime", type=Path, action="append", default=[], help="folder of libtvm_runtime.so")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        bundle = Bundle(options.bundle)
        folders = runtime_folders(options.runtime, options.bundle)
        if options.worker is not None:
            serve(bundle, folders, options.worker)
            return 0
        return _measured(bundle, folders, options)
    except Failure as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run.py: stopped; what was measured is kept, and the same command goes on.", file=sys.stderr)
        return 130


def _measured(bundle: Bundle, folders: Sequence[Path], options: argparse.Namespace) -> int:
    results = Results(options.results or options.bundle / RESULTS, bundle)
    candidates, kernels = bundle.manifest["candidates"], bundle.manifest["kernels"]
    valid, said = 0, 0.0
    with Child(bundle, folders) as child:
        for record in measure_all(bundle, results, child, options.seconds):
            valid += bool(record["run_secs"])
            if time.monotonic() > said + 2:
                said = time.monotonic()
                name = kernels[candidates[record["candidate"]]["kernel"]]["name"]
                took = f"{1e6 * min(record['run_secs']):.1f} us" if record["run_secs"] else record["failure"]
                print(f"{record['candidate'] + 1}/{len(candidates)} {name}: {took}", flush=True)
        where = f" on {child.machine.get('device', child.machine['cpu'])}" if child.machine else ""
    print(f"{len(results.done)} of {len(candidates)} candidates have a result, {valid} were measured now{where}")
    print(f"bring back: saevit-tvm tune --import-results {results.path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
