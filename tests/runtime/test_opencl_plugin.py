"""TVM's runtime with our OpenCL device, on a real driver (PoCL): right, cached, and clear when something is wrong."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saevit_tvm.runtime import opencl
from saevit_tvm.runtime.opencl.plugin import cache_folder

pytestmark = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])

LENGTH = 1000
# What runs in the processes that tests start: one kernel of a library, without the compiler.
CALL = """
import sys
import numpy as np
from saevit_tvm.support.errors import SaevitError
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
def plugins(give_plugin: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with nothing in it but the plugin."""
    folder = tmp_path_factory.mktemp("opencl")
    give_plugin(folder)
    before = os.environ.get("SAEVIT_TVM_CACHE")
    os.environ["SAEVIT_TVM_CACHE"] = str(folder)
    opencl.activate.cache_clear()
    opencl.activate()
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


def test_copies_begin_where_they_should(plugins: Path) -> None:
    """Parts of tensors: from the host into one, from one to another, and back."""
    import tvm

    device, values = tvm.runtime.device("opencl", 0), np.arange(64, dtype="float32")

    def part(tensor: Any, first: int) -> Any:
        return tensor._create_view((16,), "float32", relative_byte_offset=4 * first)

    source, target = tvm.runtime.tensor(values, device), tvm.runtime.tensor(0 * values, device)
    part(source, 8).copyto(part(target, 40))
    np.testing.assert_array_equal(target.numpy(), [0] * 40 + [*range(8, 24)] + [0] * 8)
    np.testing.assert_array_equal(part(target, 36).numpy(), [0] * 4 + [*range(8, 20)])
    part(target, 4).copyfrom(values[48:])
    np.testing.assert_array_equal(target.numpy()[:24], [0] * 4 + [*range(48, 64)] + [0] * 4)


def test_a_kernel_computes_and_takes_time(plugins: Path, library: Path) -> None:
    import tvm

    device = tvm.runtime.device("opencl", 0)
    module = tvm.runtime.load_module(str(library))
    x = np.arange(LENGTH, dtype="float32")
    there, back = tvm.runtime.tensor(x, device), tvm.runtime.empty((LENGTH,), "float32", device)
    begun = time.perf_counter()
    timed = module.time_evaluator("scale", device, number=3, repeat=2)(there, back)
    passed = time.perf_counter() - begun
    np.testing.assert_array_equal(back.numpy(), 2 * x + 1)
    assert len(timed.results) == 2 and all(seconds > 0 for seconds in timed.results)
    assert 3 * sum(timed.results) < passed  # the device takes no longer than the clock on the wall


@pytest.mark.slow
def test_all_that_it_makes_is_given_back(
    call: Callable[..., Any], library: Path, failing_opencl: dict[str, str], tmp_path: Path
) -> None:
    """By the driver's own count: after kernels, timed ones, and failures of both."""
    do = f"""
    import gc, os, tvm
    opencl.activate()
    device = tvm.runtime.device("opencl", 0)
    def work():
        module = tvm.runtime.load_module({str(library)!r})
        x = np.arange({LENGTH}, dtype="float32")
        there, back = (tvm.runtime.tensor(x, device) for _ in range(2))
        timed = module.time_evaluator("scale", device, number=3, repeat=2)
        for order, act in [
            ("clEnqueueNDRangeKernel -5", lambda: module["scale"](there, back)),
            ("clEnqueueNDRangeKernel -5 3", lambda: timed(there, back)),
            ("clEnqueueReadBuffer -5", back.numpy),
        ]:
            os.environ["FAIL"] = order
            try:
                act()
            except Exception as error:
                assert "could not" in str(error), error
                del os.environ["FAIL"]
            else:
                sys.exit(order + " was not noticed")
        timed(there, back)
        assert (back.numpy() == 2 * x + 1).all()
    work()
    gc.collect()"""
    balance = tmp_path / "balance"
    for _ in range(2):  # from source, then from the cache
        done = call(do.strip(), **failing_opencl, BALANCE=str(balance))
        assert done.returncode == 0, done.stderr
        # TVM keeps what it has loaded, and so there is one kernel.
        assert balance.read_text().split() == ["memory", "0", "programs", "0", "kernels", "1", "events", "0"]


@pytest.mark.slow
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


# Images -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def imaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with one convolution, 8 x 8 positions and 4 to 8 channels, that reads its weights through an image."""
    import tvm

    from saevit_tvm.backends.opencl import generating_kernels
    from schedules.gpu.primitives.conv import Conv, Tiling
    from schedules.machines.gpus import LIMITS

    tiling = dataclasses.asdict(Tiling(lanes=4, channels=4, columns=8, rows=4, staged=0, image=1))
    limits = LIMITS["adreno"]
    func = Conv(1, 8, 8, 4, 8).generated(limits, tiling).with_attr("global_symbol", "conv")
    target = tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm"}})
    path = tmp_path_factory.mktemp("imaged") / "conv.so"
    with generating_kernels(limits):
        tvm.compile(tvm.IRModule({"conv": func}), target=target).export_library(str(path))
    return path


def convolve(module: Any, w: np.ndarray) -> None:
    """Call it, on memory of its own that is given back afterwards, and see that it is right."""
    import tvm

    device = tvm.runtime.device("opencl", 0)
    x = np.random.RandomState(1).standard_normal((1, 4, 8, 8)).astype("float32")
    there = [tvm.runtime.tensor(value, device) for value in (x, w, np.zeros(8, "float32"))]
    out = tvm.runtime.empty((1, 8, 8, 8), "float32", device)
    module["conv"](*there, out)
    np.testing.assert_allclose(out.numpy(), np.einsum("nchw,ck->nkhw", x, w), rtol=2e-5, atol=2e-5)


def test_an_image_goes_with_its_buffer(plugins: Path, imaged: Path) -> None:
    """Weights in memory that was others' before, which drivers like to give again."""
    import tvm

    module = tvm.runtime.load_module(str(imaged))
    for seed in range(30):
        convolve(module, np.random.RandomState(seed).standard_normal((4, 8)).astype("float32"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NO_IMAGES": "1"}, ("has no images", "'conv_kernel'", "build for another target")),
        ({"FAIL": "clCreateImage -10"}, ("weights of 128 bytes as an image", "CL_IMAGE_FORMAT_NOT_SUPPORTED", "alone")),
        ({"FAIL": "clCreateImage -40"}, ("CL_INVALID_IMAGE_SIZE", "build for a target that reads buffers alone")),
    ],
)
def test_a_device_without_such_images_says_so(
    call: Callable[..., Any], imaged: Path, failing_opencl: dict[str, str], environment: dict[str, str], words: Any
) -> None:
    do = f"""
    opencl.activate()
    module = abi.global_function("ffi.Module.load_from_file.so")({str(imaged)!r}, "so")
    shapes = (1, 4, 8, 8), (4, 8), (8,), (1, 8, 8, 8)
    there = [abi.to_device(abi.lend(np.ones(shape, "float32")), opencl.OPENCL) for shape in shapes]
    for _ in range(2):
        abi.module_function(module, "conv")(*there)
        assert (there[-1].fetch() == 5).all()"""
    assert call(do.strip()).returncode == 0
    refused(call(do.strip(), **failing_opencl, **environment), *words)


# The cache --------------------------------------------------------------------


def test_the_second_process_compiles_nothing(call: Callable[..., Any], tmp_path: Path) -> None:
    assert call().returncode == 0
    (entry,) = entries(tmp_path)
    before = entry.stat()
    assert call().returncode == 0
    after = entry.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # a miss would have replaced it


def test_kernels_are_kept_for_one_driver_and_one_source(
    call: Callable[..., Any], tmp_path: Path, failing_opencl: dict[str, str]
) -> None:
    """After an update of the driver, and for another model whose kernel has the same name."""
    assert call().returncode == 0
    assert call(**failing_opencl, ANOTHER_DRIVER="1").returncode == 0
    assert len(entries(tmp_path)) == 2
    other = tmp_path / "other.so"
    compiled("x[i] + x[i] + T.float32(1)").export_library(str(other))
    assert call(f"call({str(other)!r})").returncode == 0
    assert len(entries(tmp_path)) == 3


@pytest.mark.slow
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


@pytest.mark.slow
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
