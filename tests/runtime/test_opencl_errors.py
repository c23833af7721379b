"""A driver that fails in earnest, by a library in front of the real one: one sentence, and then on as before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import os, sys
import numpy as np
import saevit_tvm
from saevit_tvm.support.errors import ArtifactError

def ask():
    return engine(np.ones(engine.inputs[0].shape, "float32"))

engine = saevit_tvm.load(sys.argv[1])
expected = None
for order, again in zip(sys.argv[2::2], sys.argv[3::2]):
    os.environ["FAIL"] = order
    for _ in range(int(again)):
        try:
            ask()
        except ArtifactError as error:
            print(error)
        else:
            sys.exit(f"{order} was not noticed")
    del os.environ["FAIL"]
    if expected is None:
        expected = ask()
    assert (ask() == expected).all(), order
"""

OUT_OF_MEMORY, LOST = "use a smaller batch or image size", "it is gone, or the system has reset it"
CASES = [
    # Memory first: after one inference there is enough of it in the pool.
    ("clCreateBuffer -4", 2, ("could not reserve", "CL_MEM_OBJECT_ALLOCATION_FAILURE", OUT_OF_MEMORY)),
    ("clEnqueueNDRangeKernel -5", 1, ("could not run the kernel", "CL_OUT_OF_RESOURCES", OUT_OF_MEMORY)),
    ("clEnqueueNDRangeKernel -5 7", 1, ("could not run the kernel", "CL_OUT_OF_RESOURCES", OUT_OF_MEMORY)),
    ("clEnqueueReadBuffer -5", 1, ("could not give its results", "CL_OUT_OF_RESOURCES")),
    ("clEnqueueReadBuffer -6", 1, ("could not give its results", "CL_OUT_OF_HOST_MEMORY", OUT_OF_MEMORY)),
    ("clEnqueueWriteBuffer -2", 3, ("could not take its input", "CL_DEVICE_NOT_AVAILABLE", LOST)),
    ("clEnqueueNDRangeKernel -2 3", 2, ("could not run the kernel", "CL_DEVICE_NOT_AVAILABLE", LOST)),
]


def test_a_driver_that_fails_is_a_sentence_and_the_engine_lives(
    opencl_artifact: Path, failing_opencl: dict[str, str]
) -> None:
    orders = [str(word) for order, times, _ in CASES for word in (order, times)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, opencl_artifact, *orders],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | failing_opencl,
    )
    assert done.returncode == 0, done.stderr
    said = iter(done.stdout.splitlines())
    for order, times, words in CASES:
        for _ in range(times):
            line = next(said)
            assert line.startswith("the OpenCL device '") and line.endswith("."), (order, line)
            assert all(word in line for word in words), (order, line)
    assert next(said, None) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("clCreateContext -2", ("could not be opened", LOST)),
        ("clFinish -5", ("CL_OUT_OF_RESOURCES",)),
    ],
)
def test_the_command_line_says_it_too(
    opencl_artifact: Path, failing_opencl: dict[str, str], cli, order: str, words: tuple[str, ...]
) -> None:
    done = cli("verify", opencl_artifact, env=os.environ | failing_opencl | {"FAIL": order})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
