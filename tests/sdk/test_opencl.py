"""The C SDK of a model for an OpenCL device, run on PoCL: the same numbers as in Python, and a sentence without one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saevit_tvm
from saevit_tvm.support.errors import UsageError
from saevit_tvm.verbs.sdk import SdkOptions, sdk


@pytest.fixture(scope="module")
def kit(opencl_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("opencl") / "sdk"
    told = sdk(SdkOptions(opencl_artifact, out, "shared"), say=lambda _line: None)
    proof = told["verification"]["shared"]
    assert proof["passed"] and proof["proof"] in ("pocl", "device") and proof["max_rel_error"] < 2e-5
    assert "lib/libsaevit_opencl.so" in told["files"]
    return out


@pytest.fixture(scope="module")
def tensor(kit: Path) -> Path:
    """The example, built from the SDK's own sources with every warning on."""
    flags = "CFLAGS=-O1 -g -Wall -Wextra -Wconversion -Wno-sign-conversion -Werror"
    subprocess.run(["make", "-s", "-C", str(kit), flags], check=True, timeout=120)
    return kit / "tensor-shared"


@pytest.fixture
def run(kit: Path, tensor: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def runs(*inputs: np.ndarray, threads: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "in").write_bytes(b"".join(x.tobytes() for x in inputs))
        command = [tensor, tmp_path / "in", tmp_path / "out", str(threads), "1", kit / "lib" / "micro.so"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)

    return runs


@pytest.mark.slow
def test_a_c_program_computes_what_python_does(opencl_artifact: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    engine = saevit_tvm.load(opencl_artifact)
    inputs = [np.random.RandomState(n).standard_normal(engine.inputs[0].shape).astype("float32") for n in range(3)]
    done = run(*inputs)
    assert done.returncode == 0, done.stderr
    answers = np.fromfile(tmp_path / "out", "float32").reshape(3, -1)
    np.testing.assert_array_equal(answers, np.concatenate([engine(x) for x in inputs]))


def test_without_a_driver_it_says_so(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "vendors").mkdir()
    done = run(OCL_ICD_VENDORS=str(tmp_path / "vendors"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "needs OpenCL: no OpenCL driver offers a device: install the GPU's driver" in done.stderr


def test_without_an_opencl_library_it_says_so(run: Callable[..., Any], tmp_path: Path) -> None:
    """A machine without libOpenCL: here, one whose every file of that name is no library."""
    for name in ("libOpenCL.so.1", "libOpenCL.so", "libmali.so.1", "libmali.so"):
        (tmp_path / name).write_text("")
    done = run(LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "needs OpenCL: there is no OpenCL library (libOpenCL.so.1): install the GPU's driver" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("clCreateContext -2", "needs OpenCL: the OpenCL device '"),
        ("clCreateBuffer -4", "could not reserve"),
        ("clEnqueueNDRangeKernel -5 20", "could not run the kernel"),
        ("clEnqueueReadBuffer -2", "it is gone, or the system has reset it"),
    ],
)
def test_a_driver_that_fails_is_a_sentence(
    run: Callable[..., Any], failing_opencl: dict[str, str], order: str, words: str
) -> None:
    done = run(np.ones((1, 3, 32, 32), "float32"), FAIL=order, **failing_opencl)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # TVM's pool has a log
    assert len(said) == 1 and words in said[0] and said[0].endswith("."), done.stderr


def test_without_its_plugin_it_says_so(kit: Path, run: Callable[..., Any]) -> None:
    plugin = kit / "lib" / "libsaevit_opencl.so"
    plugin.rename(plugin.with_suffix(".away"))
    try:
        done = run()
    finally:
        plugin.with_suffix(".away").rename(plugin)
    assert done.returncode == 1 and "libsaevit_opencl.so" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flavour", ["static", "both"])
def test_the_static_flavour_is_refused(opencl_artifact: Path, tmp_path: Path, flavour: str) -> None:
    with pytest.raises(UsageError, match="whose kernels need TVM's runtime: give --flavour shared"):
        sdk(SdkOptions(opencl_artifact, tmp_path / "sdk", flavour), say=lambda _line: None)
    assert not (tmp_path / "sdk").exists()
