"""TVM's runtime with our OpenCL device, on a real driver (PoCL): right, cached, and clear when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saevit_tvm.runtime import opencl
from saevit_tvm.runtime.opencl.plugin import cache_folder
from saevit_tvm.runtime.opencl.plugin import library as compiled_plugin

pytestmark = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])

LENGTH = 1000
# What runs in the processes that tests start: one kernel of a library, without the compiler.
CALL = """
import sys
import numpy as np
from saevit_tvm.errors import SaevitError
from saevit_tvm.runtime import abi, opencl

def call(path):
    opencl.activate()
    module = abi.global_function("ffi.Module.load_from_file.so")(path, "so")
    x = np.arange({length}, dtype="float32")
    there = abi.to_device(abi.lend(x), opencl.OPENCL)
    back = abi.to_device(abi.lend(x), opencl.OPENCL)
    abi.module_function(module, "scale")(there, back)
    assert (back.fetch() == 2 * x + 1).all()
    return module

try:
    {do}
except SaevitError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with nothing in it but the plugin."""
    folder = tmp_path_factory.mktemp("opencl")
    before = os.environ.get("SAEVIT_TVM_CACHE")
    os.environ["SAEVIT_TVM_CACHE"] = str(folder)
    opencl.activate.cache_clear()
    opencl.activate()
    compiled_plugin()  # also where another test has brought one into this process before
    yield folder
    os.environ.pop("SAEVIT_TVM_CACHE")
    if before is not None:
        os.environ["SAEVIT_TVM_CACHE"] = before


def compiled(body: str, group: int = 8) -> Any:
    """A library with one kernel `scale(x, out)`; the body sees the position `i`."""
    import tvm
    from tvm.script import from_source, tirx

    source = f"""
@T.prim_func(s_tir=True)
def scale(x: T.Buffer(({LENGTH},), "float32"), out: T.Buffer(({LENGTH},), "float32")):
    T.func_attr({{"global_symbol": "scale"}})
    for b in T.thread_binding({-(-LENGTH // group)}, thread="blockIdx.x"):
        for t in T.thread_binding({group}, thread="threadIdx.x"):
            if b * {group} + t < {LENGTH}:
                out[b * {group} + t] = {body.replace("[i]", f"[b * {group} + t]")}
"""
    target = tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm"}})
    return tvm.compile(tvm.IRModule({"scale": from_source(source, extra_vars={"T": tirx})}), target=target)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale") / "scale.so"
    compiled("x[i] * T.float32(2) + T.float32(1)").export_library(str(path))
    return path


@pytest.fixture
def call(plugins: Path, library: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the kernel in a fresh process, its kernel cache in `tmp_path`."""
    (tmp_path / "plugins").symlink_to(plugins / "plugins")

    def run(
        do: str = f"call({str(library)!r})", unprivileged: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CALL.format(length=LENGTH, do=do)]
        if unprivileged and os.geteuid() == 0:  # whom permissions would not hold back
            command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
        environment = {"SAEVIT_TVM_CACHE": str(tmp_path), **environment}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
        )

    return run


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "opencl").iterdir())


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The process said one sentence and ended."""
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.rstrip().endswith(".")
    for word in words:
        assert word in done.stderr


# The device -------------------------------------------------------------------


def test_the_driver_is_described() -> None:
    first = opencl.devices()[0]
    assert first.name and first.platform and first.driver
    assert first.proof == ("pocl" if first.platform == "Portable Computing Language" else "device")


def test_tvm_sees_the_device(plugins: Path) -> None:
    import tvm

    device = tvm.runtime.device("opencl", 0)
    assert device.exist and not tvm.runtime.device("opencl", 99).exist
    assert device.device_name == opencl.devices()[0].name
    assert device.max_threads_per_block >= 1 and device.max_shared_memory_per_block >= 1024
    assert device.multi_processor_count >= 1 and device.total_global_memory > 0
    assert device.compute_version.startswith("OpenCL ")


def test_values_travel_unchanged(plugins: Path) -> None:
    import tvm

    device = tvm.runtime.device("opencl", 0)
    for dtype in ("float32", "int8", "int64"):
        values = np.random.RandomState(0).randint(-100, 100, (3, 5, 7)).astype(dtype)
        there = tvm.runtime.tensor(values, device)
        np.testing.assert_array_equal(there.copyto(device).numpy(), values)
        assert there.device == device
    assert tvm.runtime.tensor(np.zeros((0, 3), "float32"), device).numpy().shape == (0, 3)


def test_a_kernel_computes_and_takes_time(plugins: Path, library: Path) -> None:
    import tvm

    device = tvm.runtime.device("opencl", 0)
    module = tvm.runtime.load_module(str(library))
    x = np.arange(LENGTH, dtype="float32")
    there, back = tvm.runtime.tensor(x, device), tvm.runtime.empty((LENGTH,), "float32", device)
    timed = module.time_evaluator("scale", device, number=3, repeat=2)(there, back)
    np.testing.assert_array_equal(back.numpy(), 2 * x + 1)
    assert len(timed.results) == 2 and all(seconds > 0 for seconds in timed.results)


def test_threads_share_the_device(call: Callable[..., Any], library: Path) -> None:
    do = f"""
    from concurrent.futures import ThreadPoolExecutor
    scale = abi.module_function(call({str(library)!r}), "scale")
    def work(number):
        x = np.full({LENGTH}, number, "float32")
        there, back = (abi.to_device(abi.lend(x), opencl.OPENCL) for _ in range(2))
        for _ in range(50):
            scale(there, back)
            assert (back.fetch() == 2 * number + 1).all()
            scale(back, there)
            assert (there.fetch() == 4 * number + 3).all()
            abi.copy(abi.lend(x), there)
        return True
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 9)))"""
    done = call(do.strip())
    assert done.returncode == 0, done.stderr


# The cache --------------------------------------------------------------------


def test_the_second_process_compiles_nothing(call: Callable[..., Any], tmp_path: Path) -> None:
    assert call().returncode == 0
    (entry,) = entries(tmp_path)
    before = entry.stat()
    assert call().returncode == 0
    after = entry.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # a miss would have replaced it


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"x" + data[1:],
        lambda data: data + b"more",
    ],
    ids=["empty", "half", "bit", "magic", "longer"],
)
def test_a_damaged_entry_is_made_again(
    call: Callable[..., Any], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    assert call().returncode == 0
    (entry,) = entries(tmp_path)
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    damaged = entry.stat().st_ino
    assert call().returncode == 0
    assert entries(tmp_path) == [entry] and entry.stat().st_ino != damaged
    assert len(entry.read_bytes()) == len(sound)


def test_binaries_that_the_driver_refuses_are_made_again(call: Callable[..., Any], tmp_path: Path) -> None:
    """As after an update of the driver that kept its version: the file is sound, its contents are not."""
    assert call().returncode == 0
    (entry,) = entries(tmp_path)
    sound = entry.read_bytes()
    body = (4).to_bytes(8, "little") + b"junk"
    entry.write_bytes(sound[:10] + digest(body).encode() + body)
    assert call().returncode == 0
    assert len(entry.read_bytes()) == len(sound)


def digest(text: bytes) -> str:
    """The sums at the head of an entry, by the letter of its format."""
    a, b, mask = 0xCBF29CE484222325, 0x9E3779B97F4A7C15, (1 << 64) - 1
    for byte in text:
        a = (a ^ byte) * 0x100000001B3 & mask
        b = (b + byte) * 0xBF58476D1CE4E5B9 & mask
        b ^= b >> 29
    return f"{a:016x}{b:016x}"


def test_without_a_place_for_the_cache_it_works_all_the_same(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "opencl").write_text("a file where the folder should be")
    assert call().returncode == 0


def test_a_folder_that_cannot_be_written_is_read(
    call: Callable[..., Any], tmp_path: Path, failing_opencl: dict[str, str]
) -> None:
    """As on a phone's system partition: what is there spares the compiler, and what is not there is not kept."""
    uncompiled = failing_opencl | {"FAIL": "clCreateProgramWithSource -6"}
    refused(call(**uncompiled), "could not take the source of its kernels")
    assert call().returncode == 0
    (entry,) = entries(tmp_path)
    entry.parent.chmod(0o555)
    try:
        assert call(unprivileged=True, **uncompiled).returncode == 0
        entry.parent.chmod(0o755)
        entry.unlink()
        entry.parent.chmod(0o555)
        assert call(unprivileged=True).returncode == 0
        assert entries(tmp_path) == []
    finally:
        entry.parent.chmod(0o755)


def test_processes_that_start_at_once_leave_one_sound_entry(call: Callable[..., Any], tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert [done.returncode for done in pool.map(lambda _: call(), range(3))] == [0, 0, 0]
    (entry,) = entries(tmp_path)
    before = entry.stat()
    assert call().returncode == 0
    assert entry.stat().st_ino == before.st_ino  # it was whole: else it would have been made again


# What can be wrong --------------------------------------------------------------


def test_no_driver(call: Callable[..., Any], tmp_path: Path) -> None:
    nowhere = tmp_path / "vendors"
    nowhere.mkdir()
    refused(call(OCL_ICD_VENDORS=str(nowhere)), "OpenCL kernels cannot run here", "install the GPU's driver")


def test_no_compiler(call: Callable[..., Any], tmp_path: Path) -> None:
    refused(call(SAEVIT_TVM_CACHE=str(tmp_path / "fresh"), PATH=str(tmp_path)), "no C++ compiler", "apt install g++")


def test_a_compiler_that_fails_leaves_nothing(call: Callable[..., Any], tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'plugin.cc:1: error: no such luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh = tmp_path / "fresh"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = call(SAEVIT_TVM_CACHE=str(fresh), PATH=path)
    assert done.returncode == 1 and "cannot be compiled" in done.stderr and "no such luck" in done.stderr
    assert list((fresh / "plugins").iterdir()) == []


def test_after_a_fork_it_says_so(call: Callable[..., Any], library: Path) -> None:
    do = f"""
    import os
    call({str(library)!r})
    child = os.fork()
    if child == 0:
        try:
            call({str(library)!r})
        except SaevitError as error:
            print(error, file=sys.stderr)
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7"""
    done = call(do.strip())
    assert done.returncode == 0, done.stderr
    assert "was forked after OpenCL was first used" in done.stderr


def test_more_memory_than_there_is(plugins: Path) -> None:
    import tvm

    with pytest.raises(Exception, match=r"could not reserve \d+ bytes .*use a smaller batch or image size"):
        tvm.runtime.empty((1 << 45,), "float32", tvm.runtime.device("opencl", 0))


def test_a_kernel_that_the_driver_cannot_compile(plugins: Path) -> None:
    import tvm

    device = tvm.runtime.device("opencl", 0)
    module = compiled('T.call_extern("float32", "no_such_function", x[i])')
    tensors = [tvm.runtime.empty((LENGTH,), "float32", device) for _ in range(2)]
    packed = _loaded(module)
    with pytest.raises(Exception, match=r"could not compile the kernel 'scale_kernel' .*no_such_function"):
        packed["scale"](*tensors)


def test_a_work_group_that_is_too_large(plugins: Path) -> None:
    import tvm

    device = tvm.runtime.device("opencl", 0)
    group = 16 * device.max_threads_per_block
    packed = _loaded(compiled("x[i]", group))
    tensors = [tvm.runtime.empty((LENGTH,), "float32", device) for _ in range(2)]
    with pytest.raises(Exception, match=f"could not run the kernel 'scale_kernel' in work-groups of {group} x 1 x 1"):
        packed["scale"](*tensors)


def _loaded(executable: Any) -> Any:
    """The library through a file: in memory it holds kernels as text that only the plugin's loader can run."""
    import tempfile

    import tvm

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "library.so")
        executable.export_library(path)
        return tvm.runtime.load_module(path)


def test_the_plugin_is_compiled_once(plugins: Path) -> None:
    assert cache_folder() == plugins
    (plugin,) = (plugins / "plugins").iterdir()
    before = plugin.stat().st_mtime_ns
    from saevit_tvm.runtime.opencl.plugin import library

    assert library() == plugin and plugin.stat().st_mtime_ns == before
