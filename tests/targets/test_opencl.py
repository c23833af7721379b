"""The smallest model for an OpenCL device, run for real on PoCL, from the build to the command line."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saevit_tvm
from saevit_tvm import backends, targets
from saevit_tvm.backends import opencl as opencl_backend
from saevit_tvm.compiler.street import Compiled
from saevit_tvm.runtime import artifact, opencl
from saevit_tvm.support.errors import ArtifactError, ParityError, TargetError
from schedules.machines.gpus import GPU, GPUS

TARGET = "generic-opencl"
pytestmark = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])


def test_the_target_is_data() -> None:
    target = targets.get(TARGET)
    assert target.tvm["kind"] == target.kind == "opencl"
    assert target.tvm["host"]["kind"] == "llvm"
    assert target.proof == opencl.devices()[0].proof
    assert backends.runs_here(target)[0]
    assert "opencl" in target.fingerprint
    assert TARGET in targets.names()


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_a_target(gpu: GPU) -> None:
    target = targets.get(gpu.name)
    assert target.tvm["max_num_threads"] == gpu.limits.work_group and target.arch == "aarch64"
    assert ("android" in target.tvm["host"]["mtriple"]) == gpu.android
    assert 50 < gpu.gigaflops < 5000 and gpu.limits.wave % gpu.warp == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("mali", "float32"), ("adreno-740", "float16")])
def test_mobile_gpus_get_an_arm_library(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device would load is not run here, but its kernels are, by the driver here."""
    from saevit_tvm.runtime import elf
    from saevit_tvm.support import toolchain
    from saevit_tvm.verbs.build import BuildOptions, build
    from saevit_tvm.verbs.verify import verify

    target = targets.get(name)
    try:
        toolchain.linker(target)
    except TargetError as error:
        pytest.skip(str(error))
    options = BuildOptions(model="saevit_micro", image_size=32, target=name, dtype=dtype, out=tmp_path)
    result = build(options, say=lambda _line: None)
    data = result.artifact.read_bytes()
    assert elf.machine(data[: elf.HEADER_SIZE]) == "aarch64"
    assert data.count(b"// Function: ") == result.manifest["kernels"]["total"]
    proof = result.manifest["verification"]
    assert proof["passed"] and proof["proof"] == "pocl" and "a host part for this CPU" in proof["machine"]
    assert 0 < proof["max_rel_error"] < (2e-5 if dtype == "float32" else proof["tolerance"])
    assert proof.get("widened", False) == (dtype == "float16")
    again = verify(result.artifact)
    assert again["passed"] and (again["proof"], again["machine"]) == ("pocl", proof["machine"])
    assert again["max_abs_error"] >= proof["max_abs_error"]  # of more inputs
    adapted = opencl_backend._adapted
    monkeypatch.setattr(opencl_backend, "_adapted", lambda *given: adapted(*given).replace("acc_ptr", "sum_ptr"))
    other = verify(result.artifact)
    assert other["proof"] == "none" and "not run by this CPU: they are others than this version makes" in other["note"]


@pytest.mark.slow
def test_what_stands_in_has_the_same_kernels(tmp_path: Path) -> None:
    """Byte for byte, and kernels that compute something else are no artifact."""
    from saevit_tvm.models.opening import open_model
    from saevit_tvm.verbs.build import BuildOptions, build

    source, target, backend = open_model("saevit_micro", image_size=32), targets.get("mali"), backends.get("opencl")
    for dtype in ("float32", "float16"):
        compiled = backends.compile_model(source, target, dtype=dtype)
        beside = backend.stand_in(compiled, tmp_path).compiled
        assert beside.target.arch == platform.machine() and beside.target.features == ()
        theirs, ours = sources_of(compiled, tmp_path / "theirs.so"), sources_of(beside, tmp_path / "ours.so")
        assert len(ours) == compiled.kernels["total"]
        if dtype == "float32":
            assert ours == theirs
        else:
            assert "half4" in "".join(theirs) and not re.search(r"\bhalf\d*\b(?! ?\*)", "".join(ours))

    adapted = opencl_backend._adapted
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ParityError, match="run on this CPU, deviate from"):
        patched.setattr(opencl_backend, "_adapted", lambda *given: adapted(*given).replace("erf(", "sin("))
        build(BuildOptions("saevit_micro", "mali", image_size=32, out=tmp_path), say=lambda _line: None)


def sources_of(compiled: Compiled, file: Path) -> list[str]:
    """Every kernel of a program as its driver gets it."""
    compiled.export(file)
    return sorted(opencl_backend.kernels_in(file))


def test_it_computes_what_pytorch_computes(opencl_artifact: Path) -> None:
    manifest = artifact.read_manifest(opencl_artifact)
    proof = manifest["verification"]
    assert proof["passed"] and proof["proof"] == opencl.devices()[0].proof
    assert proof["max_rel_error"] < 2e-5
    assert manifest["target"]["name"] == TARGET
    kernels = manifest["kernels"]
    assert kernels["total"] == kernels["scheduled"] and kernels["tuned"] == kernels["fallback"] == 0
    assert all(count["found"] == count["expected"] for count in manifest["regions"].values())


@pytest.mark.slow
def test_adrenos_images_in_a_whole_model() -> None:
    from saevit_tvm.backends import compile_model
    from saevit_tvm.backends.launches import launches
    from saevit_tvm.models.opening import open_model

    rows = launches(compile_model(open_model("saevit_micro", image_size=64), targets.get("adreno")).module)
    # Where several work-groups read the same weights: the stem's two, three at 16 x 16, the one between the stages.
    assert sum(row["calls"] for row in rows if row["images"]) == 6
    # What comes through an image counts like any other load.
    assert all(row["bytes"] <= row["bytes_loaded"] + row["bytes_stored"] for row in rows)


def test_engines_agree_from_any_thread(opencl_artifact: Path) -> None:
    engine, other = saevit_tvm.load(opencl_artifact), saevit_tvm.load(opencl_artifact, threads=1)
    shape = engine.inputs[0].shape
    inputs = [np.random.RandomState(seed).standard_normal(shape).astype("float32") for seed in range(4)]
    expected = [engine(x) for x in inputs]
    assert not np.array_equal(expected[0], expected[1])
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(lambda work: work[0](work[1]), [(e, x) for x in inputs for e in (engine, other)]):
            assert any(np.array_equal(again, one) for one in expected)
    strided = np.repeat(inputs[0], 2, axis=3)[:, :, :, ::2]
    np.testing.assert_array_equal(engine(strided), expected[0])


def test_the_command_line(opencl_artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    verified = cli("verify", opencl_artifact, "--json")
    assert verified.returncode == 0, verified.stderr
    result = json.loads(verified.stdout)
    assert result["passed"] and result["proof"] == opencl.devices()[0].proof
    from PIL import Image

    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (80, 100, 3), np.uint8)).save(picture)
    ran = cli("run", opencl_artifact, picture, "--json")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["results"][0]["top"]) == 5


@pytest.mark.slow
def test_it_is_measured_like_any_artifact(opencl_artifact: Path, cli: Callable[..., Any]) -> None:
    done = cli("bench", opencl_artifact, "--against", "none", "--runs", "3", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["results"]
    assert row["median_ms"] > 0 and row["max_abs_error"] < 1e-4


@pytest.mark.slow
def test_without_opencl_it_says_so(opencl_artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    nowhere = tmp_path / "vendors"
    nowhere.mkdir()
    blind = os.environ | {"OCL_ICD_VENDORS": str(nowhere)}
    done = cli("run", opencl_artifact, tmp_path / "x.png", env=blind)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "needs an OpenCL device" in done.stderr and "install the GPU's driver" in done.stderr
    result = json.loads(cli("verify", opencl_artifact, "--json", env=blind).stdout)
    assert not result["passed"] and result["proof"] == "none" and "needs an OpenCL device" in result["note"]
    listed = json.loads(cli("targets", "--json", env=blind).stdout)["targets"]
    (row,) = [row for row in listed if row["name"] == TARGET]
    assert not row["runs_here"] and row["proof"] == "none"


def test_damaged_kernels_are_a_sentence(opencl_artifact: Path, tmp_path: Path) -> None:
    """An artifact whose kernels are not what was compiled, by the letter of the file format."""
    data = bytearray(opencl_artifact.read_bytes())
    start = data.index(b"// Function: ")
    manifest = artifact.read_manifest(opencl_artifact)
    data[start - 8 : start] = (1 << 40).to_bytes(8, "little")  # the length of the source
    library, forged = tmp_path / "library.so", tmp_path / "forged.so"
    library.write_bytes(data[: manifest["size"]])
    artifact.seal(library, manifest, forged)
    with pytest.raises(ArtifactError, match="OpenCL kernels of this library cannot be read"):
        saevit_tvm.load(forged)
