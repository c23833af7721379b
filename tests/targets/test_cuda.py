"""CUDA artifacts where there is no GPU: what is in them, how it is checked, and what is said when they are run."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import saevit_tvm
from saevit_tvm import backends, targets
from saevit_tvm.backends import fatbin, nvrtc
from saevit_tvm.backends.device_code import DeviceCode
from saevit_tvm.compiler.street import Compiled
from saevit_tvm.compiler.work import Work
from saevit_tvm.emulators import cuda as emulated
from saevit_tvm.models.opening import open_model
from saevit_tvm.models.recreate import recreate
from saevit_tvm.proof import answers as proof
from saevit_tvm.proof import parity
from saevit_tvm.proof.stand_in import STOOD_IN_FOR
from saevit_tvm.runtime import artifact, cuda
from saevit_tvm.runtime.cuda import errors
from saevit_tvm.runtime.tensors import specs_of
from saevit_tvm.support.errors import ArtifactError, CompileError, ParityError, TargetError, UsageError
from saevit_tvm.verbs import build as build_verb
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.verify import verify
from schedules.gpu.launch import OVERLAPPING
from schedules.machines.gpus import limits_of
from schedules.machines.nvidia import ARCHITECTURES, CHIPS

lacking = nvrtc.missing()
needs_compiler = pytest.mark.skipif(lacking is not None, reason=lacking or "")
needs_emulation = pytest.mark.skipif(emulated.missing() is not None, reason=emulated.missing() or "")
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


def test_of_many_architectures_those_are_built_for_that_can() -> None:
    every = targets.get("cuda")
    assert every.computing_in("float16") == every.computing_in("float32") == every
    for dtype in ("bfloat16", "tf32"):
        able = every.computing_in(dtype)
        assert able.architectures == every.architectures[1:] and able.architectures[0] == "sm_80"
        assert able.fingerprint == "cuda-sm_80" and dtype in limits_of(able.tvm).tensor_cores
        with pytest.raises(UsageError, match=f"'cuda-sm_75' cannot compute in {dtype}: give --dtype float32 or"):
            targets.get("cuda-sm_75").computing_in(dtype)


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
    from saevit_tvm.backends.device_code import check

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
@pytest.mark.parametrize("early", ["", "*b = *a;", "if (*a > 0) b = a;", "atomicAdd(b, 1.0f);"])
def test_a_kernel_that_does_not_wait_for_its_inputs_is_found(early: str) -> None:
    from saevit_tvm.backends.device_code import compile_kernels

    wait = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
    source = f'extern "C" __global__ void later(float* a, float* b) {{ {early} {wait} a[1] = *b; }}'
    if early:
        with pytest.raises(CompileError, match="'later' does not wait for its inputs"):
            compile_kernels(source, ("sm_90",))
    else:
        assert compile_kernels(source, ("sm_90",)).report["kernels"]["later"]["overlaps"]


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
def test_an_artifact_holds_machine_code_and_no_source(cuda_artifact: Path) -> None:
    manifest, data = artifact.read_manifest(cuda_artifact), cuda_artifact.read_bytes()
    code = manifest["device_code"]
    assert code["architectures"] == ["sm_90"] and code["ptx"] == "sm_90" and code["compiler"].startswith("NVRTC 13")
    (found,) = fatbin.find(data)
    assert [(each.kind, each.architecture) for each in found] == [("cubin", 90), ("ptx", 90)]
    assert all(each.kernels() == set(code["kernels"]) for each in found)
    assert b"__global__" not in data and b"vm.builtin.cuda_graph.run_or_capture" in data
    assert manifest["kernels"]["fallback"] == 0 and len(code["kernels"]) >= manifest["kernels"]["total"]
    assert not any(kernel["spill_bytes"] for kernel in code["kernels"].values())
    # Each is launched to overlap with the one before it, and waits.
    assert all(kernel["overlaps"] for kernel in code["kernels"].values())
    assert data.count(OVERLAPPING.encode()) == len(code["kernels"])
    if not cuda.available()[0]:
        assert manifest["verification"]["proof"] == "none" and not manifest["verification"]["passed"]


# What its kernels compute --------------------------------------------------


def on_this_cpu(manifest: dict[str, Any]) -> float:
    assert manifest["verification"]["arithmetic"]["inputs"] == STOOD_IN_FOR
    return manifest["verification"]["arithmetic"]["max_rel_error"]


@needs_emulation
@without_gpu
def test_a_build_runs_its_kernels(cuda_artifact: Path) -> None:
    assert on_this_cpu(artifact.read_manifest(cuda_artifact)) < 2e-5


@needs_emulation
@without_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "batch", "least"),
    [("cuda-sm_75", "float16", 17, 3e-4), ("jetson-orin", "tf32", 3, 1e-4)],
)
def test_tensor_cores_compute_what_pytorch_computes(
    target: str, dtype: str, batch: int, least: float, tmp_path: Path
) -> None:
    """At batches that no tile divides, few or many; as far off as such short numbers are, and no more.

    Also where the library is for another CPU than this one, and its kernels are called from here all the same.
    """
    options = BuildOptions("saevit_micro", target, batch=batch, image_size=32, dtype=dtype, out=tmp_path)
    manifest = build(options, say=lambda _line: None).manifest
    assert least < on_this_cpu(manifest) < manifest["verification"]["tolerance"]
    kernels = manifest["device_code"]["kernels"].values()
    assert sum(each["tensor_products"] > 0 for each in kernels) >= 12
    assert not any(each["spill_bytes"] for each in kernels)
    launches = manifest["launches"]
    on_tensor_cores, work = (sum(row["calls"] * row[key] for row in launches) for key in ("tensor_ops", "float_ops"))
    assert on_tensor_cores > 0.6 * work


@needs_emulation
@without_gpu
@pytest.mark.slow
def test_the_trained_model_classifies_as_rightly_in_bfloat16(
    held_out: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """On a third of the pictures that were held out of its training."""
    options = BuildOptions("saevit_micro", "cuda-sm_89", weights="digits", batch=40, dtype="bfloat16", out=tmp_path)
    made = build(dataclasses.replace(options, dump_ir=tmp_path / "ir"), say=lambda _line: None)
    assert 1e-3 < on_this_cpu(made.manifest) < made.manifest["verification"]["tolerance"]
    (source,) = (tmp_path / "ir").glob("*-kernels.cu")
    gpu = emulated.environment(source.read_text(), "sm_89", tmp_path)
    images, digits = (each[::3] for each in held_out)
    answers = proof.answers(made.artifact, [(part,) for part in np.split(images, 3)], tmp_path, environment=gpu)
    scores = np.concatenate([outputs[0] for outputs in answers])
    (exact,) = open_model("saevit_micro", weights="digits").reference(images)
    right, right_before = ((each.argmax(1) == digits).mean() for each in (scores, exact))
    assert right >= right_before - 1 / len(images)
    assert (scores.argmax(1) == exact.argmax(1)).mean() > 0.99


def compiled_from(source: str, manifest: dict[str, Any]) -> Compiled:
    code = DeviceCode(b"", manifest["device_code"], source)
    return Compiled(None, None, targets.get("cuda-sm_90"), {}, Work(), {}, None, [], [], code, backends.get("cuda"))


@pytest.mark.slow
@needs_emulation
@without_gpu
def test_kernels_that_compute_something_else_are_no_artifact(cuda_artifact: Path, tmp_path: Path) -> None:
    manifest, library = artifact.read_manifest(cuda_artifact), tmp_path / "a space" / "library.so"
    library.parent.mkdir()
    library.write_bytes(cuda_artifact.read_bytes()[: manifest["size"]])
    (source,) = (cuda_artifact.parent / "ir").glob("*-kernels.cu")
    inputs = parity.random_inputs(specs_of(manifest["inputs"]), 1)
    model = recreate(manifest, None)
    given = (inputs, [model.reference(*each) for each in inputs], library, model, lambda _line: None)
    with pytest.raises(ParityError, match="the kernels, run on this CPU, deviate from pytorch by"):
        build_verb._stood_in(manifest, compiled_from(source.read_text().replace("erff(", "sinf("), manifest), *given)


@pytest.mark.slow
@needs_emulation
@without_gpu
def test_verify_runs_its_kernels_again(cuda_artifact: Path) -> None:
    found = verify(cuda_artifact)
    assert not found["passed"] and found["proof"] == "none" and 0 < found["arithmetic"]["max_rel_error"] < 2e-5
    assert "needs an NVIDIA GPU" in found["note"] and "run by this CPU, deviate from pytorch by" in found["note"]


@needs_emulation
def test_a_compiler_that_cannot_costs_only_the_proof(cuda_artifact: Path, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = artifact.read_manifest(cuda_artifact)
    compiled = compiled_from('#error "too old"\n', manifest)
    assert (
        build_verb._stood_in(manifest, compiled, [], [], tmp_path / "library.so", recreate(manifest, None), said.append)
        == {}
    )
    (line,) = said
    assert line.startswith("its kernels are not run by this CPU: 'g++' cannot compile") and "too old" in line


@needs_compiler
@without_gpu
@pytest.mark.slow
def test_without_a_gpu_it_says_so(cuda_artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"needs an NVIDIA GPU \(target cuda-sm_90\), and there is no"):
        saevit_tvm.load(cuda_artifact)
    for command in (("run", cuda_artifact, tmp_path / "x.png"), ("bench", cuda_artifact)):
        done = cli(*command)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "needs an NVIDIA GPU" in done.stderr


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "folder", lambda: None)
    with pytest.raises(TargetError, match=r"'cuda' cannot be built: .* is not installed: pip install"):
        backends.require(targets.get("cuda"))


@needs_compiler
def test_another_gpu_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from saevit_tvm.runtime.cuda import library

    code = {"architectures": ["sm_80", "sm_90"], "ptx": "sm_90"}
    manifest = {"target": {"name": "custom"}, "device_code": code}
    monkeypatch.setattr(library, "available", lambda: (True, ""))
    for capability, fits in ((75, False), (80, True), (86, True), (87, False), (90, True), (100, True), (120, True)):
        monkeypatch.setattr(library, "devices", lambda found=capability: [cuda.Device("GPU", found)])
        if fits:
            library.check_device(manifest, "x.so")
        else:
            with pytest.raises(
                ArtifactError, match=f"holds code for sm_80, sm_90, and the GPU here, GPU, is sm_{capability}"
            ):
                library.check_device(manifest, "x.so")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("RuntimeError: CUDA Runtime Error: cudaErrorMemoryAllocation (2): out of memory", "out of memory"),
        ("CUDAError: cuModuleLoadData(...) failed with error: CUDA_ERROR_NO_BINARY_FOR_GPU", "no code for this GPU"),
        ("RuntimeError: CUDA Runtime Error: cudaErrorInsufficientDriver (35): CUDA driver", "driver is too old"),
        ("InternalError: CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS grid=(1,1,1)", "was lost"),
        ("RuntimeError: CUDA Runtime Error: cudaErrorNoDevice (100): no device", "finds no NVIDIA GPU"),
        ("CUDAError: cuModuleLoadData(...) failed with error: CUDA_ERROR_NEW", "failed with CUDA_ERROR_NEW: see"),
        ("RuntimeError: CUDA Runtime Error: cudaErrorUnknown (999): unknown error", "failed with status 999: see"),
    ],
)
def test_errors_of_cuda_are_sentences(words: str, sentence: str) -> None:
    found = errors.of_words(words)
    assert found is not None and sentence in found
    assert errors.of_words("an array is out of memory") is None


@needs_compiler
def test_models_of_time_are_of_chips_with_the_architecture(cuda_artifact: Path) -> None:
    from saevit_tvm.measure.modelled import modelled
    from saevit_tvm.runtime import manifest

    found = modelled(cuda_artifact)
    manifest.validate(found, "modelled")
    (chip,) = found["devices"]
    assert (chip["name"], chip["family"]) == ("h200", "sm_90") and chip["roofline_ms"] > 0
    assert {chip.sm for chip in CHIPS} == set(ARCHITECTURES)


@needs_compiler
def test_all_between_input_and_output_is_captured(cuda_artifact: Path) -> None:
    """What is left in `main` reads the input or writes the output, which move from one inference to the next."""
    (planned,) = (cuda_artifact.parent / "ir").glob("*-library.py")
    functions = dict(re.findall(r"    def (\w*main\w*)\((.*?)\n\n", planned.read_text() + "\n\n", re.DOTALL))
    assert functions.keys() == {"main", "main_cuda_graph_capture"}
    kernels = {name: re.findall(r"^        cls\.(\w+)\(", text, re.MULTILINE) for name, text in functions.items()}
    launches = artifact.read_manifest(cuda_artifact)["launches"]
    assert len(kernels["main_cuda_graph_capture"]) == sum(row["calls"] for row in launches) - 2
    assert kernels["main"] == [launches[0]["kernel"].removesuffix("_kernel"), "head"]
    assert functions["main"].count("cuda_graph.run_or_capture") == 1
    assert re.search(r"cls\.conv\(x, ", functions["main"]) and "(x, " not in functions["main_cuda_graph_capture"]


WARPS = """
extern "C" __global__ void __launch_bounds__(80) work_kernel(float* out) {
  __shared__ float partial[3];
  int i = threadIdx.x;
  unsigned mask = __activemask();
  float mine = i;
  out[i] = __shfl_down_sync(mask, mine, 3, 8);
  out[80 + i] = __shfl_up_sync(mask, mine, 1, 16);
  out[160 + i] = __shfl_xor_sync(mask, -mine, 5);
  out[240 + i] = __shfl_sync(mask, mine, 2, 4);
  for (int apart = 8; apart > 0; apart /= 2) mine += __shfl_down_sync(mask, mine, apart, 16);
  if (i % 16 == 0) out[320 + i / 16] = mine;
  if (i % 32 == 0) partial[i / 32] = mine;
  __syncthreads();
  float sum = 0;
  if (i < 32) {  // only the first warp meets here
    sum = i < 3 ? partial[i] : 0;
    for (int apart = 2; apart > 0; apart /= 2) sum += __shfl_down_sync(__activemask(), sum, apart);
    if (i == 0) partial[0] = sum;
  }
  __syncthreads();
  if (i == 79) out[325] = partial[0];
}
"""


@needs_emulation
def test_threads_of_a_warp_hand_numbers_to_each_other(tmp_path: Path) -> None:
    """As TVM's sums over many threads do, the last warp of a block being short."""
    library = ctypes.CDLL(str(emulated.kernels(WARPS, tmp_path / "warps.so")))
    out = np.full(326, np.nan, "float32")
    place = ctypes.c_void_p(out.ctypes.data)
    sizes = ((ctypes.c_uint * 3)(*size) for size in ((1, 1, 1), (80, 1, 1)))
    library.run_work_kernel(*sizes, (ctypes.c_void_p * 1)(ctypes.addressof(place)))
    i = np.arange(80)
    np.testing.assert_array_equal(out[:80], np.where(i % 8 + 3 < 8, i + 3, i))
    np.testing.assert_array_equal(out[80:160], np.where(i % 16 < 1, i, i - 1))
    np.testing.assert_array_equal(out[160:240], -(i ^ 5))
    np.testing.assert_array_equal(out[240:320], i // 4 * 4 + 2)
    sums = i.reshape(5, 16).sum(1)
    np.testing.assert_array_equal(out[320:325], sums)
    assert out[325] == sums[0] + sums[2] + sums[4]
