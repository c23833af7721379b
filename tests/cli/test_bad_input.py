"""Everything a user can get wrong: one sentence, the right exit status, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from saevit_tvm.runtime.manifest import schema

jsonschema = pytest.importorskip("jsonschema")

MICRO = ("build", "--no-cache", "--model", "saevit_micro", "--image-size", "64")


@pytest.fixture
def state():
    from saevit_tvm.models.opening import open_model

    return dict(open_model("saevit_micro", image_size=64).module.state_dict())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# What to build ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--target", "nativ"], 2, ["unknown target 'nativ'", "x86-64-v3", "did you mean 'native'?"]),
        (["--target", '{"kind": "llvm"'], 2, ["not valid JSON"]),
        (["--target", '{"kind": "cuda"}'], 2, ["cuda"]),
        (["--model", "saevit_xxs"], 2, ["unknown model 'saevit_xxs'", "saevit_micro", "did you mean 'saevit_xs'?"]),
        (["--dtype", "float23"], 2, ["unknown dtype 'float23'", "did you mean 'float32'?"]),
        (["--image-size", "0"], 2, ["image size 0"]),
        (["--image-size", "1"], 2, ["image size 1", "32"]),
        (["--image-size", "100000"], 2, ["image size 100000", "4096"]),
        (["--image-size", "64by48"], 2, ["'64by48' is not a size", "480x640"]),
        (["--image-size", "64x100000"], 2, ["image size 64x100000", "4096"]),
        (["--batch", "0"], 2, ["batch 0"]),
        (["--classes", "0"], 2, ["0 classes"]),
        (["--target", "mali", "--threads", "2"], 2, ["--threads 2", "'mali'", "leave it out"]),
        (["--threads", "0"], 2, ["--threads", "1<=x<=256"]),
        (["--name", "../up"], 2, ["'../up' cannot be the name"]),
        (["--name", ""], 2, ["cannot be the name"]),
        (["--weights", "nowhere.safetensors"], 2, ["nowhere.safetensors"]),
        (["--model", "nowhere.pt2"], 2, ["nowhere.pt2"]),
        (
            ["--model", "saevit_micro", "--labels", "nowhere.txt"],
            2,
            ["'nowhere.txt' does not name the model's classes"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_an_impossible_build_is_refused(cli, tmp_path, args, status, words, refused):
    refused(cli("build", "--out", "deep/out", *args, cwd=tmp_path), status, *words)
    assert names(tmp_path) == []


# Checkpoints ------------------------------------------------------------------


@pytest.fixture
def refused_weights(cli, refused, tmp_path):
    def check(state, *words):
        torch.save(state, tmp_path / "net.pt")
        done = cli(*MICRO, "--weights", "net.pt", cwd=tmp_path)
        assert names(tmp_path) == ["net.pt"]
        return refused(done, 1, "net.pt", *words)

    return check


@pytest.mark.slow
def test_missing_tensor(state, refused_weights):
    del state["head.weight"]
    refused_weights(state, "head.weight")


@pytest.mark.slow
def test_extra_tensor(state, refused_weights):
    refused_weights(state | {"tail.weight": torch.ones(3)}, "tail.weight")


@pytest.mark.slow
def test_misshapen_tensor(state, refused_weights):
    name = next(name for name, tensor in state.items() if tensor.dim() == 4)
    refused_weights(state | {name: torch.ones(1, 2, 3, 4)}, name, "[1, 2, 3, 4]")


@pytest.mark.slow
def test_weights_that_are_no_numbers(state, refused_weights):
    state["head.weight"] = state["head.weight"].clone()
    state["head.weight"][0, 0] = float("nan")
    refused_weights(state, "head.weight", "NaN")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.slow
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_pickle_bomb_does_not_go_off(cli, tmp_path, write, refused):
    if write == "torch":
        torch.save({"head.weight": Bomb()}, tmp_path / "net.pt")
    else:
        (tmp_path / "net.pt").write_bytes(pickle.dumps(Bomb()))
    refused(cli(*MICRO, "--weights", "net.pt", cwd=tmp_path), 1, "net.pt")
    assert names(tmp_path) == ["net.pt"]


def test_garbage_for_weights(cli, tmp_path, refused):
    (tmp_path / "net.safetensors").write_bytes(b"\xff" * 100)
    refused(cli(*MICRO, "--weights", "net.safetensors", cwd=tmp_path), 1, "net.safetensors")


# Where to put it --------------------------------------------------------------


def test_output_folder_that_is_a_file(cli, tmp_path, refused):
    (tmp_path / "out").write_text("mine")
    refused(cli(*MICRO, cwd=tmp_path), 2, "'out' is not a directory")
    refused(cli(*MICRO, "--out", "out/deeper", cwd=tmp_path), 2, "is not a directory")
    assert (tmp_path / "out").read_text() == "mine"


def test_artifact_name_that_is_a_folder(cli, tmp_path, refused):
    (tmp_path / "out" / "a.so").mkdir(parents=True)
    refused(cli(*MICRO, "--name", "a", cwd=tmp_path), 2, "'out/a.so' is a directory")
    assert names(tmp_path / "out") == ["a.so"]


def test_read_only_output_folder(cli, mounted, refused):
    folder = mounted("ro,size=1m")
    refused(cli(*MICRO, "--out", folder), 1, str(folder), "Read-only file system")
    refused(cli(*MICRO, "--out", folder / "new"), 1, str(folder), "Read-only file system")


def test_full_output_folder_is_found_before_compiling(cli, mounted, refused):
    folder = mounted("size=64k")
    done = cli(*MICRO, "--out", folder / "new")
    refused(done, 1, str(folder), "No space left on device")
    assert "compiling" not in done.stderr
    assert names(folder) == []


@pytest.mark.slow
def test_output_folder_that_fills_up_meanwhile(during, mounted, refused, tmp_path):
    folder = mounted("size=8m")

    def fill(_process):
        (folder / "filler").write_bytes(b"x" * (8 * 2**20 - 2**16))

    done = during(fill, "compiling", 0.0, *MICRO, "--out", folder, cwd=tmp_path)
    refused(done, 1, str(folder), "No space left on device")
    assert names(folder) == ["filler"]


def test_dump_folder_that_is_a_file(cli, tmp_path, refused):
    (tmp_path / "ir").write_text("mine")
    refused(cli(*MICRO, "--dump-ir", "ir", cwd=tmp_path), 2, "'ir' is not a directory")
    assert names(tmp_path) == ["ir"]


@pytest.mark.slow
def test_no_c_compiler_is_found_before_compiling(cli, tmp_path, refused):
    done = cli(*MICRO, cwd=tmp_path, env=os.environ | {"PATH": str(tmp_path)})
    refused(done, 1, "needs a C compiler", "apt install gcc")
    assert "compiling" not in done.stderr and names(tmp_path) == []


# Artifacts --------------------------------------------------------------------


@pytest.fixture
def damaged(parts, forge):
    def make(kind: str, artifact: Path, path: Path) -> Path:
        data = artifact.read_bytes()
        library, manifest = parts(artifact)
        if kind == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif kind == "bit-flipped":
            path.write_bytes(data[:50_000] + bytes([data[50_000] ^ 1]) + data[50_001:])
        elif kind == "foreign":
            path.write_bytes(library)
        elif kind == "text":
            path.write_text("not a library")
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "later format":
            forge(library, manifest | {"format": 2}, path)
        elif kind == "another CPU":
            forge(library, manifest | {"target": manifest["target"] | {"features": ["avx9"]}}, path)
        elif kind == "another architecture":
            forge(library[:18] + b"\xb7\x00" + library[20:], manifest, path)
        elif kind == "another TVM":
            forge(library, manifest | {"versions": manifest["versions"] | {"tvm": "0.99.0"}}, path)
        return path

    return make


KINDS = {
    "truncated": "cut short",
    "bit-flipped": "damaged",
    "foreign": "no saevit-tvm manifest",
    "text": "not a library",
    "empty": "is empty",
    "later format": "format 2",
    "another CPU": "avx9",
    "another architecture": "aarch64",
    "another TVM": "0.99.0",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_that_cannot_be_used(cli, micro_artifact, tmp_path, picture, kind, refused, damaged):
    bad = damaged(kind, micro_artifact, tmp_path / "bad.so")
    both = ["bench", micro_artifact, bad]
    for command in (["verify", bad], ["run", bad, picture], ["bench", bad, "--against", "none"], both):
        refused(cli(*command), 1, "bad.so", KINDS[kind])


@pytest.mark.parametrize(("kind", "words"), [("absent", "does not exist"), ("directory", "is a directory")])
def test_an_artifact_that_is_no_file_is_wrong_usage(cli, tmp_path, picture, kind, words, refused):
    bad = tmp_path / "bad.so"
    if kind == "directory":
        bad.mkdir()
    both = ["bench", __file__, bad]
    for command in (["verify", bad], ["run", bad, picture], ["bench", bad, "--against", "none"], both):
        refused(cli(*command), 2, "bad.so", words, "--help")


def test_verify_tells_scripts_that_nothing_was_proven(cli, micro_artifact, tmp_path, damaged):
    bad = damaged("another CPU", micro_artifact, tmp_path / "bad.so")
    done = cli("verify", "--json", bad)
    result = json.loads(done.stdout)
    jsonschema.validate(result, schema("verify"))
    assert done.returncode == 1 and not result["passed"] and result["proof"] == "none"


# Pictures ---------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_one_bad_picture_and_nothing_is_classified(cli, micro_artifact, tmp_path, picture, content, refused):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(picture.read_bytes()[:500] if content is None else content)
    refused(cli("run", micro_artifact, picture, bad), 1, "bad.jpg")


def test_a_picture_that_is_no_file_is_wrong_usage(cli, micro_artifact, tmp_path, refused):
    refused(cli("run", micro_artifact, "nowhere.png"), 2, "nowhere.png")
    refused(cli("run", micro_artifact, tmp_path), 2, str(tmp_path), "there is no picture")


def test_too_many_classes_wanted(cli, micro_artifact, picture, refused):
    refused(cli("run", micro_artifact, picture, "--top", "1001"), 2, "--top 1001", "1000 classes")
    refused(cli("run", micro_artifact, picture, "--top", "0"), 2, "--top 0")


# Tune ------------------------------------------------------------------------


def test_tune_wrong_usage(cli, tmp_path, refused):
    more = str(1 + len(os.sched_getaffinity(0)))
    for args, status, words in (
        (["--threads", more], 2, [f"cut for {more} threads", "tune for fewer threads"]),
        (["--target", "rpi4"], 1, ["'rpi4' cannot be tuned on this machine", "--measure rpc://HOST:PORT/KEY"]),
        (["--measure", "rpc://board/rpi4"], 2, ["rpc://HOST:PORT/KEY"]),
        (["--trials", "0"], 2, ["--trials"]),
    ):
        refused(cli("tune", "--store", tmp_path / "store", *args), status, *words)
    assert names(tmp_path) == []


# Bench ------------------------------------------------------------------------


def test_bench_wrong_usage(cli, micro_artifact, refused):
    refused(cli("bench", micro_artifact, "--against", "torhc"), 2, "torch-compile", "did you mean 'torch'?")
    refused(cli("bench", micro_artifact, "--threads", "0"), 2, "--threads 0")
    refused(cli("bench", micro_artifact, "--threads", "100000"), 2, "--threads 100000", "cores")


@pytest.mark.parametrize(
    ("count", "args", "words"),
    [
        (3, [], ["Got unexpected extra argument", "bench --help"]),
        (1, ["--pairs", "3"], ["--pairs is for two artifacts", "give another one"]),
        (2, ["--pairs", "0"], ["--pairs"]),
        (2, ["--against", "torch"], ["--against means nothing beside two artifacts", "leave it out"]),
        (2, ["--weights", "a.pt", "--emulated"], ["--weights means nothing beside two artifacts"]),
        (2, ["--threads", "100000"], ["--threads 100000", "cores"]),
    ],
)
def test_bench_of_two_wrong_usage(cli, micro_artifact, refused, count, args, words):
    refused(cli("bench", *[micro_artifact] * count, *args), 2, *words)


def test_bench_of_two_that_cannot_be_compared(cli, micro_artifact, tmp_path, parts, forge, refused):
    library, manifest = parts(micro_artifact)
    smaller = [{"name": "x", "shape": [1, 3, 32, 32], "dtype": "float32"}]
    inputs = forge(library, manifest | {"inputs": smaller}, tmp_path / "inputs.so")
    refused(
        cli("bench", micro_artifact, inputs), 2, "inputs.so'", "1x3x64x64 float32 and 1x3x32x32 float32", "--image-size"
    )
    outputs = forge(library, manifest | {"outputs": smaller}, tmp_path / "outputs.so")
    refused(cli("bench", micro_artifact, outputs), 2, "their outputs are 1x1000 float32 and 1x3x32x32 float32")
    gpu = manifest["target"] | {"tvm": {"kind": "opencl"}}
    gpu = forge(library, manifest | {"target": gpu}, tmp_path / "gpu.so")
    refused(cli("bench", "--emulated", micro_artifact, gpu), 2, "gpu.so'", "instructions do not compare with launches")
    refused(cli("bench", "--emulated", micro_artifact, micro_artifact), 1, "leave out --emulated")
