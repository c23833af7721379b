"""What a GPU artifact says of its launches is what the driver sees, and the model made of it adds up."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from saevit_tvm.measure import modelled
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.runtime.manifest import schema
from saevit_tvm.support.errors import ArtifactError


@pytest.fixture(scope="module")
def rows(opencl_artifact: Path) -> list[dict[str, Any]]:
    return read_manifest(opencl_artifact)["launches"]


def test_every_kernel_of_the_library_has_a_row(opencl_artifact: Path, rows: list[dict[str, Any]]) -> None:
    sources = {name.decode() for name in re.findall(rb"// Function: (\w+)", opencl_artifact.read_bytes())}
    assert {row["kernel"] for row in rows} == sources


@pytest.mark.slow
def test_the_driver_is_asked_for_as_many_launches(
    opencl_artifact: Path, rows: list[dict[str, Any]], failing_opencl: dict[str, str], cli: Callable[..., Any]
) -> None:
    """Three inferences, and then one launch too many is the first that fails."""
    inferences = read_manifest(opencl_artifact)["verification"]["inputs"]
    launches = inferences * sum(row["calls"] for row in rows)
    for first, status in ((launches + 1, 0), (launches, 1)):
        fails = {"FAIL": f"clEnqueueNDRangeKernel -5 {first}"}
        done = cli("verify", opencl_artifact, env=os.environ | failing_opencl | fails)
        assert done.returncode == status, (first, done.stderr)


def test_the_work_is_that_of_the_model(rows: list[dict[str, Any]]) -> None:
    """By hand: multiply-adds of the convolutions and the head, which are nearly all there is at this size."""
    work = sum(row["calls"] * row["float_ops"] for row in rows)
    dims, sides, expansion, classes = (16, 32, 48, 64), (8, 4, 2, 1), 4, 1000
    macs = 16 * 16 * 8 * 27 + 8 * 8 * 16 * 8 * 9 + dims[-1] * classes
    for index, (c, side) in enumerate(zip(dims, sides, strict=True)):
        area, before = side * side, dims[index - 1] if index else 0
        macs += area * (9 * before * c + 9 * (1 + expansion) * c + c * c + 2 * expansion * c * c)
    assert 0.9 * 2 * macs < work < 1.4 * 2 * macs
    assert all(row["bytes"] <= row["bytes_loaded"] + row["bytes_stored"] for row in rows)


@pytest.mark.slow
def test_bench_emulated_models_gpus(opencl_artifact: Path, cli: Callable[..., Any]) -> None:
    done = cli("bench", "--emulated", "--json", opencl_artifact)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    jsonschema.validate(result, schema("modelled"))
    assert "not a time" in result["kind"] and {each["family"] for each in result["devices"]} == {"mali", "adreno"}
    for device in result["devices"]:
        alone = sum(row["calls"] * row["on"][device["name"]]["us"] for row in result["kernels"])
        assert device["roofline_ms"] == pytest.approx(1e-3 * alone)
        # Never faster than either rate allows, never as if more lanes were busy than there are.
        assert 1.000001e-3 * alone >= 1e-6 * result["float_ops"] / device["gigaflops"]
        assert 1.000001e-3 * alone >= 1e-6 * result["bytes"] / device["gigabytes_per_second"]
        assert 0 < device["occupancy"] <= 1 and device["memory_bound"] <= result["launches"]
    table = cli("bench", "--emulated", opencl_artifact).stdout
    assert "not a time" in table and "mali-g610" in table and "lanes busy" in table


@pytest.mark.slow
def test_bench_emulated_of_two(opencl_artifact: Path, cli: Callable[..., Any]) -> None:
    command = ("bench", "--emulated", opencl_artifact, opencl_artifact)
    result = json.loads(cli(*command, "--json").stdout)
    jsonschema.validate(result, schema("emulated-pair"))
    for row in result["artifacts"]:
        jsonschema.validate(row, schema("modelled"))
    assert set(result["ratios"]) == {"launches", "bytes", "bytes_loaded", "bytes_stored", "float_ops"}
    assert set(result["ratios"].values()) == {1}
    table = cli(*command).stdout
    assert "generic-opencl" in table and "not a time" in table and "launches" in table


def test_a_launch_by_hand() -> None:
    """Twenty work-groups of 24 on a GPU of ten cores with warps of 16: three quarters of the lanes, all cores."""
    (gpu,) = [gpu for gpu in modelled.GPUS if gpu.name == "mali-g710"]
    row = {
        "group": [24, 1, 1],
        "grid": [20, 1, 1],
        "float_ops": 10**6,
        "bytes": 10,
        "registers": 32,
        "local_bytes": 8192,
    }
    found = modelled._launch(gpu, row, "float32")
    assert found["bound"] == "arithmetic" and found["occupancy"] == pytest.approx(0.75)
    assert found["us"] == pytest.approx(1e3 / (gpu.gigaflops * 0.75))
    assert found["groups_a_core"] == gpu.limits.local_bytes // 8192
    assert modelled._launch(gpu, row | {"bytes": 10**9}, "float32")["bound"] == "memory"


def test_tensor_cores_have_rates_of_their_own() -> None:
    """NVIDIA states 312 and 156 TFLOP/s of float16 and tf32 for an A100, and 19.5 without tensor cores."""
    (gpu,) = [gpu for gpu in modelled.CUDA_GPUS if gpu.name == "a100"]
    row = {"group": [32, 4, 1], "grid": [108, 1, 1], "float_ops": 10**9, "bytes": 10, "registers": 32, "local_bytes": 0}
    for dtype, on_tensor_cores, rate in (("float32", 0, 19.5), ("tf32", 10**9, 156), ("float16", 10**9, 312)):
        found = modelled._launch(gpu, row | {"tensor_ops": on_tensor_cores}, dtype)
        assert found["us"] == pytest.approx(1e3 / rate, rel=0.01)
    half = modelled._launch(gpu, row | {"tensor_ops": 5 * 10**8}, "float16")
    assert half["us"] == pytest.approx(500 / 19.5 + 500 / 312, rel=0.01)


def test_an_older_artifact_says_so(opencl_artifact: Path, tmp_path: Path) -> None:
    from saevit_tvm.runtime import artifact

    manifest = read_manifest(opencl_artifact)
    library, older = tmp_path / "library.so", tmp_path / "older.so"
    library.write_bytes(opencl_artifact.read_bytes()[: manifest["size"]])
    artifact.seal(library, {key: value for key, value in manifest.items() if key != "launches"}, older)
    with pytest.raises(ArtifactError, match="says nothing of its launches"):
        modelled.modelled(older)
