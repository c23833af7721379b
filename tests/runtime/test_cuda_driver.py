"""CUDA artifacts behind a driver that is not NVIDIA's: what TVM's runtime asks of it, and what is said when it fails.

What kernels compute there is in tests/targets/test_cuda.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm.emulators import cuda as emulated
from saevit_tvm.runtime import artifact

Environment = dict[str, str]

RUN = """
import os, sys
import numpy as np
import saevit_tvm
from saevit_tvm.support.errors import ArtifactError

path, *orders = sys.argv[1:]
engine = None
for order in orders:
    os.environ["FAIL"] = order
    try:
        engine = engine or saevit_tvm.load(path)
        engine(np.ones(engine.inputs[0].shape, "float32"))
    except ArtifactError as error:
        print(error)
    else:
        print("well")
"""

THREADS = """
import sys, threading
import numpy as np
import saevit_tvm

def ask():
    start.wait()
    engine = saevit_tvm.load(sys.argv[1])
    for _ in range(3):
        engine(np.ones(engine.inputs[0].shape, "float32"))
    answered.append(engine)

start, answered = threading.Barrier(4), []
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(answered))
"""

LONG = """
import ctypes, struct, sys

class Launch(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("rest", ctypes.c_void_p * 2)]

driver, launches, numbers = ctypes.CDLL(None), int(sys.argv[1]), (ctypes.c_float * int(sys.argv[2]))(1)
image = ctypes.create_string_buffer(struct.pack("<IIQ", 0xBA55ED50, 0, 64) + b"spread\\0")
module, kernel, stream, graph, ready = (ctypes.c_void_p() for _ in range(5))
cells = [ctypes.c_void_p(ctypes.addressof(numbers) + 4 * index) for index in range(len(numbers))]
arguments = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
launch = Launch((1,) * 6)
assert not driver.cuModuleLoadData(ctypes.byref(module), image)
assert not driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"spread")
assert not driver.cudaStreamCreate(ctypes.byref(stream))
assert not driver.cudaStreamBeginCapture(stream, 0)
launch.stream = stream
for _ in range(launches):
    assert not driver.cuLaunchKernelEx(ctypes.byref(launch), kernel, arguments, None)
assert not driver.cudaStreamEndCapture(stream, ctypes.byref(graph))
assert not driver.cudaGraphInstantiate(ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
assert not driver.cudaGraphDestroy(graph)
for cell in cells:
    cell.value = None  # the graph has its own
assert not driver.cudaGraphLaunch(ready, stream)
print(*sorted(set(numbers)))
"""


@pytest.fixture
def python(fake_gpu: Environment) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program where the fake driver is."""

    def run(program: str, *arguments: Any, **told: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environment = os.environ | fake_gpu | told
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    return run


def launched(python: Callable[..., Any], path: Path, inferences: int, log: Path) -> Counter[str]:
    done = python(RUN, path, *["nothing 0"] * inferences, CALLS=str(log))
    assert done.returncode == 0 and done.stdout.split() == ["well"] * inferences, done.stderr
    return Counter(log.read_text().splitlines())


def test_an_inference_is_one_graph_between_two_kernels(
    cuda_artifact: Path, python: Callable[..., Any], tmp_path: Path
) -> None:
    """The kernel that reads the input and the one that writes the output stand by themselves: these move."""
    launches = sum(row["calls"] for row in artifact.read_manifest(cuda_artifact)["launches"])
    # The first inference runs everything once by itself, captures it, and launches nothing more.
    assert launched(python, cuda_artifact, 1, tmp_path / "one") == {
        "kernel 1": launches,
        "captured 1": launches - 2,
    }
    assert launched(python, cuda_artifact, 4, tmp_path / "four") == {
        "kernel 1": launches + 3 * 2,
        "captured 1": launches - 2,
        f"graph {launches - 2}": 3,
    }


@pytest.mark.slow
def test_a_graph_may_be_long_and_its_kernels_may_take_much(python: Callable[..., Any], tmp_path: Path) -> None:
    """As long as those of models other than SAEViT, where one kernel may join a hundred tensors."""
    count, launches = 100, 2000
    parameters = ", ".join(f"float* a{index}" for index in range(count))
    body = " ".join(f"a{index}[0] += a0[0];" for index in range(1, count))
    source = f'extern "C" __global__ void __launch_bounds__(1) spread({parameters}) {{ {body} }}'
    library = emulated.kernels(source, tmp_path / "kernels.so")
    done = python(LONG, launches, count, KERNELS=str(library))
    assert done.returncode == 0 and done.stdout.strip() == "1.0 2000.0", done.stderr


def test_engines_take_turns(cuda_artifact: Path, python: Callable[..., Any]) -> None:
    """While one captures its graph, another that copies or reserves memory would spoil it."""
    done = python(THREADS, cuda_artifact)
    assert done.returncode == 0 and done.stdout.split() == ["4"], done.stderr


LOST = "the GPU was lost while it computed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("orders", "said"),
    [
        (["cudaMalloc 2", "nothing 0"], ["the GPU is out of memory", "well"]),
        (["nothing 0", "cudaMemcpyAsync 2", "nothing 0"], ["well", "the GPU is out of memory", "well"]),
        (["cuModuleLoadData 209"], ["the artifact holds no code for this GPU"]),
        (["cuModuleLoadData 222"], ["the NVIDIA driver is too old"]),
        (["cuLaunchKernelEx 701"], ["the GPU has fewer registers or less shared memory"]),
        (["cuLaunchKernelEx 700 3", "nothing 0"], [LOST, LOST]),
        (["nothing 0", "cudaGraphLaunch 719", "nothing 0"], ["well", LOST, LOST]),
        (["nothing 0", "cudaMemcpyAsync 719 2", "nothing 0"], ["well", LOST, LOST]),
        (["cudaSetDevice 3"], ["CUDA does not survive a fork"]),
        (["nothing 0", "cudaGraphLaunch 999"], ["well", "CUDA failed with status 999"]),
    ],
)
def test_a_driver_that_fails_is_a_sentence(
    orders: list[str], said: list[str], cuda_artifact: Path, python: Callable[..., Any]
) -> None:
    done = python(RUN, cuda_artifact, *orders)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(words) for line, words in zip(lines, said, strict=True)), lines


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ("90 12040 1", "the NVIDIA driver is too old: install one for CUDA 13"),
        ("90 13000 0", "the driver finds no NVIDIA GPU"),
        ("75 13000 1", "holds code for sm_90, and the GPU here, NVIDIA Nothing, is sm_75"),
    ],
)
def test_a_gpu_that_will_not_do_is_a_sentence(
    gpu: str, words: str, cuda_artifact: Path, fake_gpu: Environment, cli: Callable[..., Any], tmp_path: Path
) -> None:
    done = cli("run", cuda_artifact, tmp_path / "x.png", env=os.environ | fake_gpu | {"FAKE_GPU": gpu})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
