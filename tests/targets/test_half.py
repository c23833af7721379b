"""float16 from the command line to the board: built, proven under qemu, tuned, and how rightly it still classifies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saevit_tvm import backends, targets
from saevit_tvm.backends import kernels_to_tune
from saevit_tvm.emulators import qemu
from saevit_tvm.models.opening import open_model
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.tuning import replay
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.counted import emulated
from schedules.dtypes import TOLERANCE

needs_qemu = pytest.mark.skipif(
    backends.how_to_run(targets.get("rpi5")) != "qemu",
    reason="needs qemu-user and a cross compiler, and no ARM machine",
)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, in float16 for a Raspberry Pi 5."""
    options = BuildOptions(
        model="saevit_micro",
        weights="digits",
        target="rpi5",
        dtype="float16",
        out=tmp_path_factory.mktemp("half"),
        dump_ir=tmp_path_factory.mktemp("ir"),
    )
    return build(options, say=lambda _line: None).artifact


@pytest.mark.slow
@needs_qemu
def test_it_is_proven_with_the_tolerance_of_its_type(half: Path) -> None:
    manifest = read_manifest(half)
    proof = manifest["verification"]
    assert half.name == "saevit_micro-rpi5-float16.so"
    assert manifest["dtype"] == manifest["recipe"]["dtype"] == "float16"
    assert {each["dtype"] for each in [*manifest["inputs"], *manifest["outputs"]]} == {"float32"}
    assert proof["passed"] and proof["proof"] == "qemu" and proof["tolerance"] == TOLERANCE["float16"]
    assert 1e-5 < proof["max_rel_error"] < proof["tolerance"]
    assert all(count["found"] == count["expected"] > 0 for count in manifest["regions"].values())
    assert manifest["kernels"]["fallback"] <= 1  # the cast of the answer


@pytest.mark.slow
@needs_qemu
def test_verify_holds_it_to_the_same(cli: Any, half: Path) -> None:
    done = cli("verify", "--json", half)
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["passed"] and result["tolerance"] == TOLERANCE["float16"]


@pytest.mark.slow
@needs_qemu
def test_it_executes_less_than_float32(half: Path, rpi5_artifact: Path) -> None:
    one, two = (emulated(path, lambda _line: None) for path in (half, rpi5_artifact))
    assert one["classes"]["fma"] < 0.65 * two["classes"]["fma"]
    assert one["instructions"] < two["instructions"] and one["bytes_loaded"] < two["bytes_loaded"]


@needs_qemu
@pytest.mark.slow
def test_the_trained_model_classifies_as_rightly(
    half: Path, held_out: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """On a third of the pictures that were held out of its training; float32 gets 97 % of them right, or more."""
    images, digits = (each[::3] for each in held_out)
    answers = np.concatenate([outputs[0] for outputs in qemu.run(half, [(image[None],) for image in images], tmp_path)])
    (exact,) = open_model("saevit_micro", weights="digits").reference(images)
    right, right_before = ((scores.argmax(1) == digits).mean() for scores in (answers, exact))
    assert right >= right_before - 1 / len(images)
    assert (answers.argmax(1) == exact.argmax(1)).mean() > 0.99


@pytest.mark.parametrize(
    ("command", "target", "words"),
    [
        ("build", "rpi4", ["target 'rpi4' cannot compute in float16", "give --dtype float32"]),
        ("tune", "android-arm64", ["target 'android-arm64' cannot compute in float16"]),
        ("build", "x86-64-v3", ["target 'x86-64-v3' cannot compute in float16"]),
    ],
)
def test_a_target_that_cannot_says_what_it_can(cli: Any, command: str, target: str, words: list[str]) -> None:
    done = cli(command, "--model", "saevit_micro", "--target", target, "--dtype", "float16")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)


@pytest.mark.slow
def test_every_kernel_of_a_type_is_tuned_for_itself() -> None:
    source, target = open_model("saevit_micro", image_size=32), targets.get("rpi5")
    keys = [
        {replay.module_key(kernel.module) for kernel in kernels_to_tune(source, target, dtype)}
        for dtype in ("float32", "float16")
    ]
    assert len(keys[0]) == 18 and len(keys[1]) == 19 and not keys[0] & keys[1]


@needs_qemu
@pytest.mark.slow
def test_what_was_tuned_is_built(cli: Any, tmp_path: Path) -> None:
    what = ("--model", "saevit_micro", "--image-size", "32", "--target", "rpi5", "--dtype", "float16")
    store = ("--store", tmp_path / "store", "--json")
    tuned = cli("tune", *what, *store, "--measure", "qemu", "--trials", "24")
    assert tuned.returncode == 0, tuned.stderr
    assert json.loads(tuned.stdout)["dtype"] == "float16"
    built = cli("build", *what, *store, "--out", tmp_path)
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["kernels"]["tuned"] >= 12
