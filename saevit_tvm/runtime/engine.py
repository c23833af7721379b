"""Running an artifact from Python: `engine = load("x.so")`, then `engine(array)`.

TVM's virtual machine is not thread-safe, and its thread pool belongs to the calling thread, changes that
thread's CPU affinity and does not survive a fork. So an engine computes on worker threads of its own, with a
virtual machine each and the weights in common. As many workers as fit the cores; more callers than that wait.
An NVIDIA GPU gets one worker, and all engines on it take turns.

To wake a worker and to be woken costs as much as some layers. What takes one thread a moment is computed in the thread
that loaded the engine, when it is that which calls: a pool of one has no threads that a fork could lose.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from saevit_tvm.runtime import abi
from saevit_tvm.runtime.artifact import check_runnable, opened
from saevit_tvm.runtime.devices import device_kind
from saevit_tvm.runtime.manifest import at_batch, batches, entry
from saevit_tvm.runtime.tensors import TensorSpec, pictures, specs_of
from saevit_tvm.support.errors import ArtifactError, UsageError

_ALIGNMENT = 64  # what TVM's kernels may assume of a tensor's memory
_POOLED_ALLOCATOR = 2
_SHARE_ALL_CORES = -3
_MOST_THREADS = 1024
_FEWEST_RUNS = 3
_A_MOMENT = 5e9  # multiply-adds: no longer than Ctrl-C may wait


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Engine:
    """Open an artifact. `threads` per inference: by default TVM_NUM_THREADS, else as many as it was cut for."""
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"threads={threads} is impossible: give a number from 1 to {_MOST_THREADS}.")
    _refuse_if_stuck()
    with opened(path) as (file, manifest):
        check_runnable(manifest, path)
        library = _library(file, manifest, path)
    return Engine(Path(path).absolute(), manifest, library, threads or _default_threads(manifest))


class Engine:
    """A loaded artifact. Call it with an array, or one for each input; any thread may, at any time.

    `inputs` and `outputs` say how it is called; one that was built for several batches takes any number of pictures.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], library: _Library, threads: int) -> None:
        self.path, self.manifest, self.threads = path, manifest, threads
        self.inputs, self.outputs = specs_of(manifest["inputs"]), specs_of(manifest["outputs"])
        self._machines = _Machines(library, threads)
        self._home = threading.get_ident() if threads == 1 and library.is_quick and not _tvm_is_used() else None
        self._start()
        _engines.add(self)
        self._result(self._machines.mine)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """The output for inputs in order or by name: NumPy in, NumPy out; PyTorch in, PyTorch out.

        Several outputs are a tuple.
        """
        given = _in_order(self.inputs, given, named)
        arrays = [_admit(x, wanted) for x, wanted in zip(given, self._wanted(given[0]), strict=True)]
        outputs = self._result(lambda: self._machines.mine().run(arrays))
        if not all(isinstance(x, (np.ndarray, np.generic)) for x in given):
            outputs = [sys.modules["torch"].from_numpy(output) for output in outputs]
        return outputs[0] if len(self.outputs) == 1 else tuple(outputs)

    def kernel_times(self, *given: np.ndarray, seconds: float = 0.3) -> list[tuple[str, float]]:
        """Every kernel in the order of an inference on a CPU, and its seconds: the least of some inferences."""
        return self._result(lambda: self._machines.another().timed(given, seconds))

    def _wanted(self, first: Any) -> Sequence[TensorSpec]:
        """What the inputs must be: where any number of pictures is taken, as many as the first one has."""
        count = next(iter(getattr(first, "shape", ())), 0)
        if "batches" not in self.manifest or count == 0:
            return self.inputs
        return [spec._replace(shape=(count, *spec.shape[1:])) for spec in self.inputs]

    def __repr__(self) -> str:
        return f"<Engine {self.path.name}: {self.manifest['model']}, {self.threads} threads>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an Engine holds native code and cannot be pickled or copied: load its file there.")

    def _start(self) -> None:
        workers = 1 if self._machines.one_at_a_time else max(1, _physical_cores() // self.threads)
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="saevit-tvm")
        self._running: set[int] = set()  # threads that compute, maybe for a caller who was interrupted

    def _result(self, work: Any) -> Any:
        _refuse_if_stuck()
        if self._home == threading.get_ident():
            return self._computed(work)
        return self._workers.submit(self._computed, work).result()

    def _computed(self, work: Callable[[], Any]) -> Any:
        self._running.add(threading.get_ident())
        try:
            return self._machines.in_turn(work)
        finally:
            self._running.discard(threading.get_ident())


class _Library:
    """The code and weights of one artifact, in memory."""

    def __init__(self, file: BinaryIO, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        kind = device_kind(manifest, file.name)
        kind.activate()
        self.devices = [abi.CPU] if kind.number == abi.CPU else [kind.number, abi.CPU]
        self.one_at_a_time = kind.one_at_a_time
        work = manifest.get("work", {}).get("multiply_adds", float("inf"))
        self.is_quick = kind.number == abi.CPU and work <= _A_MOMENT
        load_library = abi.global_function("ffi.Module.load_from_file.so")
        self.module = load_library(_fresh_name(file), "so")


_libraries: weakref.WeakValueDictionary[tuple[int, int], _Library] = weakref.WeakValueDictionary()
_loading = threading.Lock()
_names = itertools.count(1)


def _library(file: BinaryIO, manifest: dict[str, Any], path: str | os.PathLike[str]) -> _Library:
    """The file's library; engines on the same file share one, as dlopen would have it in any case."""
    status = os.fstat(file.fileno())
    key = status.st_dev, status.st_ino
    with _loading:
        library = _libraries.get(key)
        if library is None:
            library = _libraries[key] = _Library(file, manifest)
    if library.manifest != manifest:
        raise ArtifactError(
            f"'{path}' was overwritten while an engine was using it: put new artifacts in place by renaming, "
            "and start this process again."
        )
    return library


def _fresh_name(file: BinaryIO) -> str:
    """A name for the open file that dlopen has not seen before.

    dlopen gives an earlier library to anyone who asks by the same name, though another file may be there now.
    So a counter is spelled in binary with slashes, which the file system reads as nothing.
    """
    spelling = "".join(".//" if bit == "1" else "./" for bit in f"{next(_names):b}")
    return f"/proc/self/fd/{spelling}{file.fileno()}"


_turn = threading.Lock()  # of all engines whose device serves one at a time


class _Machines:
    """A virtual machine for every worker thread, all on one library."""

    def __init__(self, library: _Library, threads: int) -> None:
        self._library, self._threads = library, threads
        self._local = threading.local()
        self.one_at_a_time = library.one_at_a_time
        self._turn: AbstractContextManager[Any] = _turn if self.one_at_a_time else nullcontext()

    def in_turn(self, work: Callable[[], Any]) -> Any:
        with self._turn:
            return work()

    def mine(self) -> _Machine:
        machine = getattr(self._local, "machine", None)
        if machine is None:
            machine = self._local.machine = self.another()
        return machine

    def another(self) -> _Machine:
        return _Machine(self._library, self._threads)


class _Machine:
    """One virtual machine, made and used by one thread."""

    def __init__(self, library: _Library, threads: int) -> None:
        configure_thread_pool(threads)
        self._machine = machine = abi.module_function(library.module, "vm_load_executable")()
        devices = [number for device in library.devices for number in (device, 0, _POOLED_ALLOCATOR)]
        abi.module_function(machine, "vm_initialization")(*devices)
        sizes = batches(library.manifest)
        self._largest = sizes[-1]
        self._entries: dict[int, _Entry] = {}
        for size in sizes:
            function = abi.module_function(machine, entry(size, self._largest))
            specs = specs_of(at_batch(library.manifest, size)["inputs"])
            self._entries[size] = _Entry(function, [_Place(spec, library.devices[0]) for spec in specs])

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """By the function for so many pictures, or by the next larger; more than the largest takes, in turns."""
        count = pictures(arrays[0].shape)
        if count in self._entries:
            return self._entries[count].run(arrays)
        starts = range(0, count, self._largest)
        parts = [[array[start : start + self._largest] for array in arrays] for start in starts]
        answers = [self._entry_for(len(part[0])).run(part) for part in parts]
        return answers[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*answers, strict=True)]

    def timed(self, arrays: Sequence[np.ndarray], seconds: float) -> list[tuple[str, float]]:
        """Each call of a kernel, by a clock around it, which this machine keeps."""
        events: list[tuple[str, float]] = []
        clock = abi.Listener(lambda _function, name, _before, *_rest: events.append((name, time.perf_counter())))
        runs: list[list[float]] = []
        end = time.perf_counter() + seconds
        self.run(arrays)
        abi.module_function(self._machine, "set_instrument")(clock)
        while len(runs) < _FEWEST_RUNS or time.perf_counter() < end:
            self.run(arrays)
            kernels = [event for event in events if not event[0].startswith("vm.")]
            runs.append([after - before for (_, before), (_, after) in zip(kernels[::2], kernels[1::2], strict=True)])
            names = [name for name, _ in kernels[::2]]
            events.clear()
        return list(zip(names, map(min, zip(*runs, strict=True)), strict=True))

    def _entry_for(self, pictures: int) -> _Entry:
        return next(self._entries[size] for size in self._entries if size >= pictures)


class _Entry:
    """One function of a virtual machine, and places for its inputs."""

    def __init__(self, function: abi.Function, places: Sequence[_Place]) -> None:
        self._function, self._places = function, places

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs; where there are fewer pictures than it takes, their rows alone."""
        given = [place.filled(array) for place, array in zip(self._places, arrays, strict=True)]
        result = self._function(*(tensor for _, tensor in given))
        tensors = result.items() if isinstance(result, abi.Array) else [result]
        outputs = [_owned(tensor, [array for array, _ in given]) for tensor in tensors]
        count, most = (pictures(array.shape) for array in (arrays[0], given[0][0]))
        return outputs if count == most else [output[:count] for output in outputs]


class _Place:
    """Where an input lies while it is computed on."""

    def __init__(self, spec: TensorSpec, device: int) -> None:
        self._staging = _aligned(spec)
        self._staged = abi.lend(self._staging)
        self._on_device = None if device == abi.CPU else abi.to_device(self._staged, device)

    def filled(self, array: np.ndarray) -> tuple[np.ndarray, abi.Tensor]:
        """The caller's own memory where it can be, and the tensor to compute on; rows that lack are zeros."""
        if array.shape == self._staging.shape and array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
            argument = abi.lend(array)
        else:
            place = self._staging
            if array.shape != place.shape:
                place, lacking = np.split(place, [len(array)])
                lacking[:] = 0
            np.copyto(place, array)
            array, argument = self._staging, self._staged
        if self._on_device is None:
            return array, argument
        abi.copy(argument, self._on_device)
        return array, self._on_device


def _owned(tensor: abi.Tensor, given: Sequence[np.ndarray]) -> np.ndarray:
    """The output as the caller's own: without a copy, unless it is an input or a constant of the model.

    The virtual machine remembers its last result, so a fresh one has two holders.
    """
    if tensor.device != abi.CPU:
        return tensor.fetch()
    output = np.asarray(tensor)
    shared = tensor.references > 2 or any(np.may_share_memory(output, array) for array in given)
    return output.copy() if shared else output


def _aligned(spec: TensorSpec) -> np.ndarray:
    memory = np.empty(spec.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + spec.nbytes].view(spec.dtype).reshape(spec.shape)


# What may come in -----------------------------------------------------------


def _in_order(specs: Sequence[TensorSpec], given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """What was given for each input, or one error that names them."""
    rest = [spec.name for spec in specs[len(given) :]]
    if len(given) > len(specs) or sorted(rest) != sorted(named):
        names = ", ".join(spec.name for spec in specs)
        count = f"{len(given)}" + (f" and {', '.join(named)}" if named else "")
        raise TypeError(f"the model takes {len(specs)} inputs ({names}), and what is given is {count}.")
    return (*given, *(named[name] for name in rest))


def _admit(x: Any, wanted: TensorSpec) -> np.ndarray:
    """The array to compute on, or one error that names both sides."""
    torch = sys.modules.get("torch")
    is_torch = isinstance(x, torch.Tensor) if torch else False
    x = np.asarray(x) if isinstance(x, np.generic) else x  # a single number of NumPy's
    if not is_torch and not isinstance(x, np.ndarray):
        raise TypeError(f"the input is a {type(x).__name__}: give a NumPy array or a PyTorch tensor.")
    dtype = str(x.dtype).removeprefix("torch.")
    device = "cpu"
    if is_torch:
        device = str(x.device) if str(x.layout) == "torch.strided" else f"{x.device} with layout {x.layout}"
    if (tuple(x.shape), dtype, device) != (wanted.shape, wanted.dtype, "cpu"):
        raise ValueError(
            f"the input has shape {tuple(x.shape)}, dtype {dtype}, on {device}, and '{wanted.name}' "
            f"must have shape {wanted.shape}, dtype {wanted.dtype}, on cpu."
        )
    return x.detach().numpy() if is_torch else x


# Threads and processes --------------------------------------------------------


def _default_threads(manifest: dict[str, Any]) -> int:
    """More threads than the work was cut for would idle, and more than there are cores would wait."""
    stated = os.environ.get("TVM_NUM_THREADS", "")
    if stated.isdigit() and int(stated):
        return int(stated)
    return min(_physical_cores(), manifest["target"]["tvm"].get("num-cores", _MOST_THREADS))


def _physical_cores() -> int:
    """The cores that this process may use, siblings of one core counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(topology.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _tvm_is_used() -> bool:
    """Whether this process may compute with TVM by itself, and wants the calling thread's pool as it is."""
    return "tvm" in sys.modules


def configure_thread_pool(threads: int) -> None:
    """Give the calling thread a TVM pool of this size, on any cores.

    Two of TVM's habits can be changed in the environment only, and who sets these variables himself is heard.
    It binds every pool to the first cores, so that two engines, or two processes, fight for the same ones. And
    its threads spin 300,000 times before they sleep, a tenth of a second and much more on a busy machine, where
    the gaps inside an inference are far below a millisecond.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "20000")
    allowed = sorted(os.sched_getaffinity(0))
    cpus = [b"%d" % allowed[index % len(allowed)] for index in range(threads)]
    cpu_list = abi.global_function("ffi.Array")(*cpus)
    abi.global_function("runtime.config_threadpool")(_SHARE_ALL_CORES, threads, cpu_list)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_forked_while_running = False


def _after_fork() -> None:
    """In a child, no worker thread exists any more: start afresh."""
    global _forked_while_running
    _forked_while_running |= _loading.locked()
    for engine in list(_engines):
        _forked_while_running |= bool(engine._running)
        engine._start()


def _refuse_if_stuck() -> None:
    if _forked_while_running:
        raise ArtifactError(
            "this process was forked while its parent was computing or loading, so TVM's locks may be stuck: "
            "fork while no inference runs, or start processes with 'spawn'."
        )


os.register_at_fork(after_in_child=_after_fork)
