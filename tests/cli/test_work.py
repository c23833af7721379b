"""The commands that do the work, as a script would use them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import saevit_tvm
from saevit_tvm.models.opening import open_model
from saevit_tvm.proof import parity
from saevit_tvm.runtime.manifest import schema
from schedules.dtypes import TOLERANCE

jsonschema = pytest.importorskip("jsonschema")


def told(done: subprocess.CompletedProcess[str], kind: str | None, status: int = 0) -> dict:
    """The one object on stdout, by its schema."""
    assert done.returncode == status, done.stderr
    result = json.loads(done.stdout)
    if kind:
        jsonschema.validate(result, schema(kind))
    return result


# build ------------------------------------------------------------------------


@pytest.mark.slow
def test_build_from_start_to_finish(cli, tmp_path):
    arguments = ("--model", "saevit_micro", "--weights", "digits", "--dump-ir", "ir", "--name", "digits.so", "--json")
    done = cli("build", *arguments, cwd=tmp_path)
    result = told(done, "build")
    assert result["artifact"] == "out/digits.so" and result["manifest"] == "out/digits.json"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["digits.json", "digits.so"]
    manifest = json.loads((tmp_path / "out" / "digits.json").read_text())
    jsonschema.validate(manifest, schema("manifest"))
    assert manifest["verification"]["passed"] and manifest["verification"]["max_abs_error"] < 1e-4
    assert manifest["labels"] == list("0123456789")
    assert str(tmp_path) not in json.dumps(manifest)
    assert result["work"]["kernels_left"] == {} and result["left_to_rules"]["time"] == 0
    assert list((tmp_path / "ir").iterdir())
    steps = [line.split()[0] for line in done.stderr.splitlines()]
    # Where it takes long, it says now and then where it is.
    assert [step for step in steps if step not in ("phase", "kernel")] == ["compiling", "linking", "verifying"]
    assert told(cli("verify", "--json", "out/digits.so", cwd=tmp_path), "verify")["reference"] == "pytorch"


@pytest.mark.slow
def test_build_for_a_cpu_that_is_not_here(cli, tmp_path):
    from saevit_tvm.backends import runs_here
    from saevit_tvm.targets import get

    if runs_here(get("x86-64-v4"))[0]:
        pytest.skip("this CPU runs every target there is")
    options = ("--no-cache", "--image-size", "64", "--target", "x86-64-v4")
    done = cli("build", "--model", "saevit_micro", *options, cwd=tmp_path)
    assert done.returncode == 0 and "not verified" in done.stderr and "proof: none" in done.stdout
    manifest = json.loads((tmp_path / "out" / "saevit_micro-x86-64-v4-64px.json").read_text())
    assert manifest["verification"]["proof"] == "none" and not manifest["verification"]["passed"]


@pytest.mark.slow
def test_a_build_that_deviates_leaves_nothing(tmp_path, monkeypatch):
    from saevit_tvm.support.errors import ParityError
    from saevit_tvm.verbs.build import BuildOptions, build

    monkeypatch.setitem(TOLERANCE, "float32", 0.0)
    with pytest.raises(ParityError, match="deviates from pytorch by"):
        build(BuildOptions(model="saevit_micro", image_size=64, out=tmp_path / "out"), lambda _line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_build_is_reproducible(cli, tmp_path, micro_artifact):
    """Also from an import of its own."""
    fresh = os.environ | {"SAEVIT_TVM_CACHE": str(tmp_path / "cache")}
    options = ("--image-size", "64", "--out", tmp_path, "--name", micro_artifact.name)
    cli("build", "--model", "saevit_micro", *options, env=fresh)
    for suffix in (".json", ".so"):
        again = (tmp_path / micro_artifact.name).with_suffix(suffix)
        assert again.read_bytes() == micro_artifact.with_suffix(suffix).read_bytes()


# tune -------------------------------------------------------------------------


@pytest.mark.slow
def test_tune_tells_scripts_what_it_measured(cli, tmp_path):
    arguments = ("--model", "saevit_micro", "--image-size", "64", "--trials", "2", "--store", tmp_path, "--json")
    result = told(cli("tune", *arguments), "tune")
    assert result["trials"] >= 2 and result["valid"] + result["failed"] == result["trials"]
    # The budget counts what was measured before, so the same command has nothing left to do.
    assert told(cli("tune", *arguments), "tune")["resumed"] == result["trials"]


# verify -----------------------------------------------------------------------


def test_verify_against_pytorch(cli, micro_artifact):
    result = told(cli("verify", "--json", micro_artifact), "verify")
    assert result["passed"] and result["proof"] == "host" and result["reference"] == "pytorch"
    assert result["inputs"] == parity.INPUTS and result["max_abs_error"] < 1e-4


def test_verify_against_what_was_recorded(cli, micro_artifact, tmp_path, parts, forge):
    library, manifest = parts(micro_artifact)
    manifest["weights"] = {"source": "file", "file": "lost.safetensors"}
    artifact = forge(library, manifest, tmp_path / "a.so")
    result = told(cli("verify", "--json", artifact), "verify")
    assert result["passed"] and result["reference"] == "recorded" and "lost.safetensors" in result["note"]

    values = manifest["reference"]["outputs"][0][0]
    values[7] += 0.01
    result = told(cli("verify", "--json", forge(library, manifest, artifact)), "verify", status=1)
    assert not result["passed"] and result["max_abs_error"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.slow
def test_verify_finds_the_wrong_weights_in_a_library(cli, micro_artifact, tmp_path, parts, forge, refused):
    library, manifest = parts(micro_artifact)
    other = open_model("saevit_micro", image_size=64, seed=1)
    manifest |= {"weights": other.weights, "weights_digest": other.weights_digest}
    artifact = forge(library, manifest, tmp_path / "a.so")
    result = told(cli("verify", "--json", artifact), "verify", status=1)
    assert not result["passed"] and result["reference"] == "pytorch" and result["max_abs_error"] > 0.01
    refused(cli("verify", artifact), 1, "deviates from its model by")


def test_verify_with_other_weights_than_were_built(cli, micro_artifact, tmp_path, refused):
    import torch

    state = open_model("saevit_micro", image_size=64, seed=1).module.state_dict()
    torch.save(dict(state), tmp_path / "other.pt")
    refused(cli("verify", micro_artifact, "--weights", tmp_path / "other.pt"), 1, "other.pt' holds other weights")


@pytest.fixture
def crashing(micro_artifact, tmp_path, parts, forge):
    library, manifest = parts(micro_artifact)
    code = bytearray(library)
    # Every function's code becomes instructions that no CPU has.
    objdump = subprocess.run(["readelf", "-S", "-W", micro_artifact], capture_output=True, text=True)
    fields = next(line.split(".text")[1].split() for line in objdump.stdout.splitlines() if " .text " in line)
    offset, size = int(fields[2], 16), int(fields[3], 16)
    code[offset : offset + size] = b"\x0f\x0b" * (size // 2) + b"\x0f" * (size % 2)
    return forge(bytes(code), manifest, tmp_path / "a.so")


def test_a_library_that_crashes_is_a_sentence(cli, crashing, refused):
    refused(cli("verify", crashing), 1, "'a.so' crashes when it is run (SIGILL)")


# run --------------------------------------------------------------------------


def test_run_gives_what_pytorch_gives(cli, micro_artifact, picture):
    from saevit_tvm.runtime.preprocess import load_image

    done = cli("run", "--json", micro_artifact, picture, picture, "--top", "3")
    first, second = told(done, None)["results"]
    source = open_model("saevit_micro", image_size=64)
    (logits,) = source.reference(load_image(picture, source.preprocessing))
    best = np.argsort(-logits[0])[:3]
    probabilities = np.exp(logits[0] - logits[0].max())
    probabilities /= probabilities.sum()
    assert [entry["class"] for entry in first["top"]] == best.tolist()
    assert [entry["probability"] for entry in first["top"]] == pytest.approx(probabilities[best], rel=1e-3)
    assert first == second


def test_run_for_people(cli, micro_artifact, picture):
    done = cli("run", micro_artifact, picture, "--top", "2")
    assert "random weights" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(picture) and len(lines) == 4 and lines[2].endswith("%")


# bench ------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_beside_two_runtimes(cli, micro_artifact):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    command = ("bench", micro_artifact, "--against", "torch,onnxruntime", "--threads", "1", "--runs", "12")
    result = told(cli(*command, "--json"), "bench")
    rows = {row["name"]: row for row in result["results"]}
    assert list(rows) == ["saevit-tvm", "torch", "onnxruntime"] and result["failed"] == []
    for row in rows.values():
        assert row["threads"] == 1 and row["runs"] == 12 and row["max_abs_error"] < 1e-4 and row["size"] > 1e5
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["first_ms"] > row["median_ms"]
        assert row["ratio"] == pytest.approx(rows["saevit-tvm"]["median_ms"] / row["median_ms"])
        assert row["cores_used"] < 1.2


@pytest.fixture
def without_onnxruntime(tmp_path):
    """The environment of a machine without it: the import system does not find it."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_others(name, *rest): return None if name == 'onnxruntime' else find(name, *rest)\n"
        "PathFinder.find_spec = find_others\n"
    )
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.slow
def test_bench_says_what_to_install_and_goes_on(cli, micro_artifact, without_onnxruntime):
    command = ("bench", micro_artifact, "--against", "onnxruntime", "--runs", "2", "--json")
    result = told(cli(*command, env=without_onnxruntime), "bench")
    assert [row["name"] for row in result["results"]] == ["saevit-tvm"]
    (row,) = result["failed"]
    assert row["name"] == "onnxruntime" and "pip install onnxruntime" in row["error"]


@pytest.mark.slow
def test_bench_finds_a_runtime_in_another_environment(cli, micro_artifact, without_onnxruntime, tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    command = ("bench", micro_artifact, "--against", "onnxruntime", "--runs", "2", "--json")
    done = cli(*command, env=without_onnxruntime | {"SAEVIT_TVM_PEERS_PYTHON": str(other)})
    assert [row["name"] for row in told(done, "bench")["results"]] == ["saevit-tvm", "onnxruntime"]


@pytest.mark.slow
def test_bench_of_what_was_never_verified_says_so(cli, micro_artifact, tmp_path, parts, forge):
    library, manifest = parts(micro_artifact)
    manifest["verification"] |= {"passed": False, "proof": "none"}
    artifact = forge(library, manifest, tmp_path / "a.so")
    assert "never verified" in cli("bench", artifact, "--against", "none", "--runs", "2").stdout


@pytest.mark.slow
def test_bench_without_the_weights(cli, micro_artifact, tmp_path, parts, forge, refused):
    library, manifest = parts(micro_artifact)
    manifest["weights"] = {"source": "file", "file": "lost.safetensors"}
    artifact = forge(library, manifest, tmp_path / "a.so")
    refused(cli("bench", artifact, "--against", "torch"), 1, "lost.safetensors", "--weights")
    result = told(cli("bench", artifact, "--runs", "3", "--json"), "bench")
    assert [row["name"] for row in result["results"]] == ["saevit-tvm"] and "lost.safetensors" in result["note"]
    assert result["results"][0]["max_abs_error"] < 1e-4


# bench of two -----------------------------------------------------------------


@pytest.mark.slow
def test_bench_of_two_builds(cli, micro_artifact, tmp_path):
    from saevit_tvm.verbs.build import BuildOptions, build

    options = BuildOptions(model="saevit_micro", image_size=64, target="x86-64-v3", threads=1, out=tmp_path)
    other = build(options, lambda _line: None).artifact
    result = told(cli("bench", micro_artifact, other, "--pairs", "3", "--runs", "20", "--json"), "bench-pair")
    assert [row["artifact"] for row in result["artifacts"]] == [str(micro_artifact), str(other)]
    assert [row["target"] for row in result["artifacts"]] == ["native", "x86-64-v3"]
    for row in result["artifacts"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] < row["first_ms"] and row["runs"] == 20
    assert len(result["ratios"]) == 3 and result["ratio"] == sorted(result["ratios"])[1]
    # One model, so there is nothing to note; another order of sums, where the vectors have another length.
    assert result["note"] is None and result["equal"] == (result["max_abs_difference"] == 0)
    assert result["max_abs_difference"] < 1e-4
    measured = result["threads"] > 1 and shutil.which("cc") is not None
    assert len(result["core_round_trip_ns"]) == (3 if measured else 0)


@pytest.mark.slow
def test_bench_of_a_file_beside_itself(cli, micro_artifact):
    command = ("bench", micro_artifact, micro_artifact, "--threads", "1", "--pairs", "2", "--seconds", "0.1")
    result = told(cli(*command, "--json"), "bench-pair")
    assert result["equal"] and result["max_abs_difference"] == 0 and result["note"] is None
    assert len(result["ratios"]) == 2 and all(ratio > 0 for ratio in result["ratios"])
    assert result["threads"] == 1 and result["core_round_trip_ns"] == []
    table = cli(*command).stdout
    assert "1 threads, 2 pairs of processes in turns" in table and "the same bit for bit" in table and "\nA/B " in table


def test_bench_of_two_models_says_so(cli, micro_artifact, tmp_path, parts, forge):
    library, manifest = parts(micro_artifact)
    manifest |= {"weights_digest": f"sha256:{'0' * 64}", "dtype": "tf32"}
    other = forge(library, manifest, tmp_path / "a.so")
    note = "these are not two builds of one model: they differ in weights and dtype"
    assert note in cli("bench", micro_artifact, other, "--threads", "1", "--runs", "2").stdout


def test_bench_of_two_of_which_one_crashes(cli, micro_artifact, crashing, refused):
    refused(cli("bench", micro_artifact, crashing), 1, "a.so' could not be measured: its process crashed (SIGILL).")


# doctor -----------------------------------------------------------------------


def checks(done: subprocess.CompletedProcess[str], status: int) -> dict[str, dict]:
    result = told(done, "doctor", status)
    assert result["ready"] == (status == 0)
    return {check["name"]: check for check in result["checks"]}


@pytest.mark.slow
def test_doctor_on_a_machine_that_is_ready(cli, tmp_path):
    found = checks(cli("doctor", "--json", "--store", tmp_path / "store"), 0)
    assert all(check["ok"] for check in found.values() if check["needed"])
    assert "2.13" in found["torch"]["detail"] and found["target native"]["detail"] == "ready"
    assert found["emulation of aarch64"]["ok"] == ("cortex-a76" in found["target rpi5"]["detail"])
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_doctor_finds_what_is_broken(cli, tmp_path):
    """No C compiler, a TVM that crashes, and a store that cannot be written."""
    (tmp_path / "tvm").mkdir()
    (tmp_path / "tvm" / "__init__.py").write_text("import os; os.abort()")
    (tmp_path / "file").write_text("")
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = cli("doctor", "--json", "--store", tmp_path / "file" / "store", env=environment)
    found = checks(done, 1)
    assert not found["C compiler"]["ok"] and "apt install gcc" in found["C compiler"]["detail"]
    assert "SIGABRT" in found["tvm-ffi serialises IR"]["detail"]
    assert not found["tuning store"]["ok"]
    assert "apt install qemu-user" in found["emulation of aarch64"]["detail"]
    assert done.stderr.startswith("saevit-tvm: this machine is not ready")


@pytest.mark.slow
def test_a_library_of_another_number_of_channels_computes_and_classifies_no_picture(tmp_path, cli) -> None:
    """And `build` says what it leaves to TVM's rules: convolutions along one axis."""
    layers = (torch.nn.Conv2d(1, 4, 3, stride=2), torch.nn.Flatten(2), torch.nn.Conv1d(4, 3, 9), torch.nn.Flatten())
    net = torch.nn.Sequential(*layers).eval()
    x = torch.randn(1, 1, 8, 8)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    result = told(cli("build", "--model", tmp_path / "net.pt2", "--out", tmp_path / "out", "--json"), "build")
    artifact, left = result["artifact"], result["left_to_rules"]
    assert result["work"]["multiply_adds"] == 9 * 9 * 4 + 9 * 4 * 3 and result["work"]["left_to_rules"] == 9 * 4 * 3
    assert left["multiply_adds"] == 0.25 and 0 < left["time"] < 1
    assert left["time"] == pytest.approx(sum(kernel["time"] for kernel in left["kernels"].values()))
    assert any("conv1d" in name and kernel["time"] > 0 for name, kernel in left["kernels"].items())
    assert np.abs(saevit_tvm.load(artifact)(x.numpy()) - net(x).detach().numpy()).max() < 1e-5
    done = cli("run", artifact, Path(__file__).parents[2] / "examples/digit-7.png")
    assert (
        done.returncode == 1 and "takes 1x1x8x8 float32, not pictures" in done.stderr and "Traceback" not in done.stderr
    )
