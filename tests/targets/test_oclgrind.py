"""Every kernel of the smallest model under oclgrind, which sees each access to memory and each race: there are none."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saevit_tvm

DRIVER = Path("/usr/lib/oclgrind/liboclgrind-rt-icd.so")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DRIVER.exists(), reason="needs oclgrind (Debian: apt install oclgrind)"),
]

LENGTH, GROUP = 100, 32
TARGET = {"kind": "opencl", "host": {"kind": "llvm"}}
MODEL = """
import sys
import numpy as np
import saevit_tvm
from saevit_tvm.runtime import opencl

assert [device.platform for device in opencl.devices()] == ["Oclgrind"]
engine = saevit_tvm.load(sys.argv[1])
np.save(sys.argv[2], engine(np.load(sys.argv[3])))
"""
KERNEL = """
import sys
import numpy as np
from saevit_tvm.runtime import abi, opencl

opencl.activate()
module = abi.global_function("ffi.Module.load_from_file.so")(sys.argv[1], "so")
x, out = (abi.to_device(abi.lend(np.arange(100, dtype="float32")), opencl.OPENCL) for _ in range(2))
abi.module_function(module, "work")(x, out)
out.fetch()
"""


@pytest.fixture(scope="module")
def cache(give_plugin: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cache")
    give_plugin(folder)
    return str(folder)


@pytest.fixture
def watched(cache: str, tmp_path: Path) -> Callable[..., str]:
    """Runs a program on oclgrind's simulator; what that has complained about."""
    (tmp_path / "oclgrind.icd").write_text(f"{DRIVER}\n")
    log = tmp_path / "log"
    environment = {"OCL_ICD_VENDORS": str(tmp_path), "OCLGRIND_DATA_RACES": "1", "OCLGRIND_LOG": str(log)}
    # Not optimised: LLVM tests bits as numbers of two bits, and its simulator does not cut off the others.
    environment |= {"SAEVIT_TVM_CACHE": cache, "OCLGRIND_BUILD_OPTIONS": "-cl-opt-disable"}

    def run(program: str, *arguments: Path) -> str:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=500, check=False, env=os.environ | environment
        )
        assert done.returncode == 0, done.stderr
        return log.read_text()

    return run


def test_the_model_reads_and_writes_only_what_is_its_own(
    opencl_artifact: Path, watched: Callable[..., str], tmp_path: Path
) -> None:
    engine = saevit_tvm.load(opencl_artifact)
    x = np.random.RandomState(0).standard_normal(engine.inputs[0].shape).astype("float32")
    np.save(tmp_path / "in.npy", x)
    assert watched(MODEL, opencl_artifact, tmp_path / "out.npy", tmp_path / "in.npy") == ""
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), engine(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("out[i] = x[i]", "Invalid write of size 4 at global memory"),
        ("if i < 100:\n    out[i] = x[i + 1]", "Invalid read of size 4 at global memory"),
        ("if i < 100:\n    out[i % 50] = x[i]", "Write-write data race at global memory"),
        ("if i < 100:\n    out[i] = x[i]", ""),
    ],
    ids=["write beyond", "read beyond", "race", "sound"],
)
def test_it_sees_what_is_wrong_with_a_kernel(
    watched: Callable[..., str], tmp_path: Path, statement: str, complaint: str
) -> None:
    library = tmp_path / "work.so"
    compiled(statement).export_library(str(library))
    said = watched(KERNEL, library)
    assert complaint in said if complaint else said == "", said


CONV = """
import sys
import numpy as np
from saevit_tvm.runtime import abi, opencl

opencl.activate()
module = abi.global_function("ffi.Module.load_from_file.so")(sys.argv[1], "so")
with np.load(sys.argv[2]) as saved:
    there = [abi.to_device(abi.lend(saved[name]), opencl.OPENCL) for name in ("x", "w", "b", "out")]
abi.module_function(module, "conv")(*there)
np.save(sys.argv[3], there[-1].fetch())
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_images_are_read_where_they_are(dtype: str, watched: Callable[..., str], tmp_path: Path) -> None:
    """A convolution as on Adreno, more work-items than there is work for; oclgrind reads images over buffers, too."""
    import tvm

    from saevit_tvm.backends.opencl import generating_kernels
    from schedules.gpu.primitives.conv import Conv
    from schedules.machines.gpus import LIMITS

    limits = dataclasses.replace(LIMITS["adreno"], half=False)
    kernel, n, c, k, side = Conv(2, 9, 9, 6, 12, dtype=dtype, given=dtype), 2, 6, 12, 9
    default = kernel.default(limits)
    assert default is not None and default.image
    func = kernel.generated(limits).with_attr("global_symbol", "conv")
    with generating_kernels(limits):
        library = tvm.compile(tvm.IRModule({"conv": func}), target=tvm.target.Target(TARGET))
    library.export_library(str(tmp_path / "conv.so"))
    random = np.random.RandomState(0)
    x, w, b = (random.standard_normal(shape).astype(dtype) for shape in ((n, c, side, side), (c, k), (k,)))
    out = np.zeros((n, k, side, side), dtype)
    np.savez(tmp_path / "in.npz", x=x, w=w, b=b.astype("float32"), out=out)
    assert watched(CONV, tmp_path / "conv.so", tmp_path / "in.npz", tmp_path / "out.npy") == ""
    expected = np.einsum("nchw,ck->nkhw", x.astype("float64"), w.astype("float64")) + b[:, None, None]
    tolerance = 2e-5 if dtype == "float32" else 5e-3
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() < tolerance * np.abs(expected).max()


def compiled(statement: str) -> Any:
    """A library with one kernel `work(x, out)`, for as many work-groups as cover the hundred numbers and more."""
    import tvm
    from tvm.script import from_source, tirx

    body = statement.replace("[i", f"[b * {GROUP} + t").replace("if i", f"if b * {GROUP} + t")
    body = body.replace(f"[b * {GROUP} + t % 50]", f"[(b * {GROUP} + t) % 50]").replace("\n", "\n            ")
    source = f"""
@T.prim_func(s_tir=True)
def work(x: T.Buffer(({LENGTH},), "float32"), out: T.Buffer(({LENGTH},), "float32")):
    T.func_attr({{"global_symbol": "work"}})
    for b in T.thread_binding({-(-LENGTH // GROUP)}, thread="blockIdx.x"):
        for t in T.thread_binding({GROUP}, thread="threadIdx.x"):
            {body}
"""
    module = tvm.IRModule({"work": from_source(source, extra_vars={"T": tirx})})
    return tvm.compile(module, target=tvm.target.Target(TARGET))
