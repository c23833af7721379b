"""CUDA artifacts where there is no GPU: what is in them, how it is checked, and what is said when they are run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import saevit_tvm
from saevit_tvm import targets
from saevit_tvm.errors import ArtifactError, CompileError, TargetError
from saevit_tvm.runtime import artifact, cuda
from saevit_tvm.runtime.cuda import errors, fatbin
from saevit_tvm.targets import nvrtc, toolchain
from schedules.gpu.devices import limits_of
from schedules.gpu.nvidia import ARCHITECTURES

lacking = nvrtc.missing()
needs_compiler = pytest.mark.skipif(lacking is not None, reason=lacking or "")
without_gpu = pytest.mark.skipif(cuda.available()[0], reason="this machine has a GPU")

SOURCE = """
extern "C" __global__ void __launch_bounds__(128) first(float* a) {
  __shared__ float s[64];
  s[threadIdx.x % 64] = a[threadIdx.x];
  __syncthreads();
  a[threadIdx.x] = erff(s[threadIdx.x / 2]);
}
extern "C" __global__ void __launch_bounds__(32) second(float* a) { a[threadIdx.x] = 1; }
"""
THREADS = {"first": 128, "second": 32}
BOTH = ("sm_75", "sm_90")


@pytest.fixture(scope="module")
def packed() -> bytes:
    programs, ptx = nvrtc.compile_all(SOURCE, BOTH)
    return nvrtc.fat_binary(programs, ptx)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from saevit_tvm.verbs.build import BuildOptions, build

    options = BuildOptions("saevit_micro", "cuda-sm_90", batch=3, image_size=64, out=tmp_path_factory.mktemp("cuda"))
    return build(options, say=lambda _line: None).artifact


def test_targets_are_data() -> None:
    listed = [target for target in targets.all_targets() if target.kind == "cuda"]
    assert {"cuda", "cuda-sm_75", "cuda-sm_90", "cuda-sm_100", "jetson-orin"} <= {each.name for each in listed}
    for target in listed:
        assert targets.get(target.name) == target
        assert target.fingerprint.startswith("cuda-sm_")
        limits = limits_of(target.tvm)
        assert (limits.work_group, limits.local_bytes, limits.registers) == (1024, 49152, 65536)
        assert list(target.architectures) == sorted(target.architectures, key=lambda sm: ARCHITECTURES[sm].number)
    assert targets.get("jetson-orin").arch == "aarch64"


# What compiled code holds -------------------------------------------------


@needs_compiler
def test_the_reader_finds_what_was_compiled(packed: bytes) -> None:
    found = fatbin.entries(packed)
    assert [(each.kind, each.architecture) for each in found] == [("cubin", 75), ("cubin", 90), ("ptx", 90)]
    assert all(each.kernels() == {"first", "second"} for each in found)
    for each in found[:2]:
        taken = fatbin.resources(each.code)
        assert 0 < taken["second"].registers <= taken["first"].registers <= 64
        assert taken["first"].shared_bytes - taken["second"].shared_bytes >= 256
    assert [len(found) for found in fatbin.find(b"before" + packed + b"after")] == [3]


@needs_compiler
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_code_is_an_error_or_read(data: st.DataObject, packed: bytes) -> None:
    damaged = bytearray(packed[: data.draw(st.integers(0, len(packed)))])
    for at in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=8)):
        if damaged:
            damaged[at] = data.draw(st.integers(0, 255))
    try:
        for each in fatbin.entries(bytes(damaged)):
            each.kernels()
    except fatbin.FatbinError:
        pass


@given(st.binary(max_size=300))
@example(fatbin.ELF_MAGIC + b"\x02\x01" + bytes(100))
def test_any_bytes_are_an_error_or_read(data: bytes) -> None:
    for read in (fatbin.entries, fatbin.resources):
        with pytest.raises(fatbin.FatbinError):
            read(data)


@needs_compiler
def test_what_is_missing_or_too_much_is_found(packed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from saevit_tvm.compiler.device_code import check

    assert check(packed, BOTH, THREADS).keys() == THREADS.keys()
    with pytest.raises(CompileError, match="1 kernels have no cubin for sm_75, 'third' first"):
        check(packed, BOTH, THREADS | {"third": 1})
    with pytest.raises(CompileError, match="have no cubin for sm_80"):
        check(packed, ("sm_75", "sm_80", "sm_90"), THREADS)
    with pytest.raises(CompileError, match="wants 2048 threads in a block, and sm_75 has 1024"):
        check(packed, BOTH, THREADS | {"first": 2048})
    with pytest.raises(CompileError, match="refuses the kernels for sm_90"):
        nvrtc.compile_all("__global__ void broken(", ("sm_90",))


@needs_compiler
def test_spills_are_counted() -> None:
    """Many numbers that are alive at once, and few registers to keep them in."""
    body = "".join(f"float v{i} = a[threadIdx.x + {i}]; " for i in range(200)) + "__syncthreads(); "
    body += "".join(f"a[threadIdx.x * 3 + {i}] = v{i}; " for i in range(200))
    source = f'extern "C" __global__ void __launch_bounds__(1024) much(float* a) {{ {body} }}'
    (program,), _ = nvrtc.compile_all(source, ("sm_90",))
    assert program.spills["much"] > 0


@needs_compiler
@pytest.mark.slow
def test_an_artifact_holds_machine_code_and_no_source(built: Path) -> None:
    manifest, data = artifact.read_manifest(built), built.read_bytes()
    code = manifest["device_code"]
    assert code["architectures"] == ["sm_90"] and code["ptx"] == "sm_90" and code["compiler"].startswith("NVRTC 13")
    (found,) = fatbin.find(data)
    assert [(each.kind, each.architecture) for each in found] == [("cubin", 90), ("ptx", 90)]
    assert all(each.kernels() == set(code["kernels"]) for each in found)
    assert b"__global__" not in data and b"vm.builtin.cuda_graph.run_or_capture" in data
    assert manifest["kernels"]["fallback"] == 0 and len(code["kernels"]) >= manifest["kernels"]["total"]
    assert not any(kernel["spill_bytes"] for kernel in code["kernels"].values())
    if not cuda.available()[0]:
        assert manifest["verification"]["proof"] == "none" and not manifest["verification"]["passed"]


@needs_compiler
@without_gpu
@pytest.mark.slow
def test_without_a_gpu_it_says_so(built: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"needs an NVIDIA GPU \(target cuda-sm_90\), and there is no"):
        saevit_tvm.load(built)
    for command in (("run", built, tmp_path / "x.png"), ("bench", built)):
        done = cli(*command)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "needs an NVIDIA GPU" in done.stderr


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_folder", lambda: None)
    with pytest.raises(TargetError, match=r"'cuda' cannot be built: .* is not installed: pip install"):
        toolchain.require(targets.get("cuda"))


@needs_compiler
def test_another_gpu_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from saevit_tvm.runtime.cuda import library

    code = {"architectures": ["sm_80", "sm_90"], "ptx": "sm_90"}
    manifest = {"target": {"name": "custom"}, "device_code": code}
    monkeypatch.setattr(library, "available", lambda: (True, ""))
    for capability, fits in ((75, False), (80, True), (86, True), (90, True), (100, True), (120, True)):
        monkeypatch.setattr(library, "devices", lambda found=capability: [cuda.Device("GPU", found)])
        if fits:
            library.check_device(manifest, "x.so")
        else:
            with pytest.raises(ArtifactError, match="holds code for sm_80, sm_90, and the GPU here, GPU, is sm_75"):
                library.check_device(manifest, "x.so")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("InternalError: CUDA: out of memory", "out of memory"),
        ("CUDAError: cuModuleLoadData failed with error: CUDA_ERROR_NO_BINARY_FOR_GPU", "no code for this GPU"),
        ("RuntimeError: CUDA: CUDA driver version is insufficient for CUDA runtime version", "driver is too old"),
        ("InternalError: CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS grid=(1,1,1)", "was lost"),
        ("RuntimeError: CUDA: no CUDA-capable device is detected", "finds no NVIDIA GPU"),
    ],
)
def test_errors_of_cuda_are_sentences(words: str, sentence: str) -> None:
    found = errors.of_words(words)
    assert found is not None and sentence in found
    assert errors.of_words("an array is out of memory") is None


def test_a_driver_that_is_too_old_is_a_sentence(tmp_path: Path) -> None:
    """A library in the driver's place that says 12.4: a real one cannot be had here."""
    import shutil
    import subprocess
    import sys

    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "driver.c"
    source.write_text(
        "int cuInit(unsigned f) { return 0; }\nint cuDriverGetVersion(int *v) { *v = 12040; return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    code = "from saevit_tvm.runtime.cuda import available; print(available())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "driver is too old: install one for CUDA 13" in done.stdout
