"""saevit-tvm sdk: what it writes, what it refuses, and that compilers and build systems take it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saevit_tvm import __version__, targets
from saevit_tvm.runtime import manifest as manifests
from saevit_tvm.support.errors import ArtifactError, SaevitError, TargetError, UsageError
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.run import run
from saevit_tvm.verbs.sdk import SdkOptions, sdk

PICTURE = Path(__file__).parents[2] / "examples" / "digit-7.png"


def quiet(_line: str) -> None:
    pass


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_what_it_should(kit: Path) -> None:
    names = listing(kit)
    for needed in ("include/saevit.h", "lib/saevit_static.o", "lib/saevit_model.o", "lib/saevit_shared.o", "README.md"):
        assert needed in names
    for needed in ("lib/micro.so", "lib/libtvm_ffi.so", "lib/libtvm_runtime.so", "src/static/plan.c", "sdk.json"):
        assert needed in names
    assert not [
        path for path in kit.rglob("*") if path.suffix in (".c", ".h", ".md", ".pc") and "@" in path.read_text()
    ]
    assert os.access(kit, os.X_OK) and kit.stat().st_mode & 0o055
    told = json.loads((kit / "sdk.json").read_text())
    assert told["flavours"] == ["static", "shared"]
    assert told["verification"]["static"]["proof"] == "host"


def test_the_static_flavour_needs_no_library_of_tvm(kit: Path, program: Callable[..., list[str]]) -> None:
    (path,) = program("tensor.c", "static")
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "tvm" not in needed and "stdc++" not in needed


def test_the_weights_are_constant_data_that_can_stay_in_flash(kit: Path, program: Callable[..., list[str]]) -> None:
    weights = json.loads((kit / "sdk.json").read_text())["workspace"]["weights"]
    (path,) = program("tensor.c", "static")
    for file in (kit / "lib" / "saevit_model.o", path):
        symbols = subprocess.run(["readelf", "-sW", file], capture_output=True, text=True, check=True).stdout
        fields = next(line.split() for line in symbols.splitlines() if line.endswith(" saevit_weights"))
        assert int(fields[2], 0) == weights > 500_000
        sections = subprocess.run(["readelf", "-SW", file], capture_output=True, text=True, check=True).stdout
        number, rest = next(
            line.strip().lstrip("[").split("]") for line in sections.splitlines() if f"[{fields[6]:>2}]" in line
        )
        name, flags = rest.split()[0], rest.split()[6]
        assert name.startswith(".rodata") and "W" not in flags and int(number) == int(fields[6])
    # What is copied to RAM when the program starts is small, and does not grow with the model.
    segments = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
    written = [line.split() for line in segments.splitlines() if line.split()[:1] == ["LOAD"] and " RW" in line]
    assert 0 < sum(int(fields[5], 16) for fields in written) < 100_000


@pytest.mark.slow
def test_one_command_builds_the_examples_and_they_classify(kit: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kit, tmp_path / "copy")
    subprocess.run(["make", "-s", "-C", str(folder), "CFLAGS=-O1 -Werror"], check=True, timeout=120)
    answers = [
        subprocess.run([folder / f"classify-{flavour}", PICTURE, *rest], capture_output=True, text=True, check=True)
        for flavour, rest in (("static", []), ("shared", [folder / "lib" / "micro.so"]))
    ]
    assert answers[0].stdout == answers[1].stdout
    assert len(answers[0].stdout.splitlines()) == 5 and "%  class" in answers[0].stdout
    broken = subprocess.run([folder / "classify-static", folder / "Makefile"], capture_output=True, text=True)
    assert broken.returncode == 1 and "not a PNG" in broken.stderr


class ByContrast(torch.nn.Module):
    """Tells pictures apart by their brightness beside their contrast; one that has none is divided by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3))
        return self.head((mean - x.amin((2, 3))) / (x.amax((2, 3)) - x.amin((2, 3))))


@pytest.mark.slow
def test_an_answer_that_is_not_a_number_names_no_class(tmp_path: Path) -> None:
    """Neither from the command line nor from the example in C."""
    torch.manual_seed(0)
    program = torch.export.export(ByContrast().eval(), (torch.zeros(1, 3, 16, 16),))
    torch.export.save(program, tmp_path / "contrast.pt2")
    built = build(BuildOptions(str(tmp_path / "contrast.pt2"), out=tmp_path, name="contrast"), quiet).artifact
    gray = tmp_path / "gray.png"
    Image.new("RGB", (20, 20), "gray").save(gray)
    assert len(run(built, [PICTURE])["results"][0]["top"]) == 4
    with pytest.raises(ArtifactError, match=r"names no class for '.*gray\.png', its answer is not a number"):
        run(built, [PICTURE, gray])

    sdk(SdkOptions(built, tmp_path / "sdk", "static", weights=str(tmp_path / "contrast.pt2")), quiet)
    subprocess.run(["make", "-s", "-C", str(tmp_path / "sdk"), "CFLAGS=-O1"], check=True, timeout=120)
    for picture, status, words in ((PICTURE, 0, ""), (gray, 1, "the model's answer is not a number")):
        told = subprocess.run([tmp_path / "sdk" / "classify-static", picture], capture_output=True, text=True)
        assert told.returncode == status and words in told.stderr and bool(told.stdout) == (status == 0)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["static", "shared"])
def test_cmake_and_pkg_config_find_it(kit: Path, tmp_path: Path, flavour: str) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.10)\nproject(user C CXX)\n"
        f"find_package(saevit 9 QUIET PATHS {kit}/cmake)\nif(saevit_FOUND)\nmessage(FATAL_ERROR 9)\nendif()\n"
        f"find_package(saevit {__version__} EXACT REQUIRED PATHS {kit}/cmake)\n"
        f"add_executable(user {kit}/example/tensor.c)\ntarget_link_libraries(user saevit::{flavour})\n"
    )
    for command in (["cmake", "-S", tmp_path, "-B", tmp_path / "build"], ["cmake", "--build", tmp_path / "build"]):
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    told = subprocess.run(
        ["pkg-config", "--cflags", "--libs", f"saevit-{flavour}"],
        env=os.environ | {"PKG_CONFIG_PATH": str(kit / "pkgconfig")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    subprocess.run(["gcc", kit / "example" / "tensor.c", *told, "-o", tmp_path / "other"], check=True)
    np.zeros((1, 3, 32, 32), np.float32).tofile(tmp_path / "in")
    outputs = []
    for user in (tmp_path / "build" / "user", tmp_path / "other"):
        subprocess.run([user, tmp_path / "in", tmp_path / "out", "1", "0", kit / "lib" / "micro.so"], check=True)
        outputs.append((tmp_path / "out").read_bytes())
    assert outputs[0] == outputs[1] and len(outputs[0]) == 4000


def test_what_stands_in_the_way_is_left_alone(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("mine")
    file.write_text("mine")
    for out, word in ((full, "not empty"), (file, "not a directory")):
        with pytest.raises(UsageError, match=word):
            sdk(SdkOptions(artifact, out), quiet)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="folder that you are in"):
        sdk(SdkOptions(artifact, Path()), quiet)
    assert listing(tmp_path) == {"full/precious", "file"}


def test_a_failure_leaves_nothing_behind(artifact: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(artifact.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        sdk(SdkOptions(damaged, tmp_path / "a" / "b"), quiet)
    with pytest.raises(SaevitError):
        sdk(SdkOptions(artifact, tmp_path / "a" / "b", weights="/nonexistent.safetensors"), quiet)
    with pytest.raises(UsageError, match="flavour"):
        sdk(SdkOptions(artifact, tmp_path / "a" / "b", flavour="dynamic"), quiet)
    assert not (tmp_path / "a").exists()


def test_a_target_that_no_sdk_can_be_made_for_is_a_sentence(artifact: Path, tmp_path: Path) -> None:
    """Artifacts for another target, as far as their manifests go."""
    data = artifact.read_bytes()
    length = int.from_bytes(data[-16:-8], "little")
    manifest = json.loads(data[-48 - length : -48])
    android = dataclasses.asdict(targets.get("android-arm64"))
    forged = tmp_path / "forged.so"
    adreno = dataclasses.asdict(targets.get("adreno-740"))
    keys = ("name", "tvm", "arch", "features")
    for target, flavour, kind, word in (
        ({key: android[key] for key in keys}, "shared", TargetError, "nobody publishes one for Android"),
        ({key: android[key] for key in keys}, "both", TargetError, "nobody publishes one for Android"),
        ({key: adreno[key] for key in keys}, "shared", TargetError, "nobody publishes one for Android"),
        ({key: adreno[key] for key in keys}, "static", TargetError, "nobody publishes one for Android"),
        (manifest["target"] | {"tvm": {"kind": "cuda"}}, "static", ArtifactError, "a CPU or an OpenCL device"),
    ):
        text = json.dumps(manifest | {"target": target}).encode()
        content = data[: -48 - length] + text
        seal = hashlib.sha256(content).digest() + struct.pack("<Q", len(text)) + b"SAEVIT1\n"
        forged.write_bytes(content + seal)
        with pytest.raises(kind, match=word):
            sdk(SdkOptions(forged, tmp_path / "out", flavour), quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_replaces_an_sdk_and_tells_of_it(
    artifact: Path, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "sdk"
    for _ in range(2):
        done = cli("sdk", artifact, "--flavour", "shared", "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        (out / "left-over").write_text("of the first")
        told: dict[str, Any] = json.loads(done.stdout)
        manifests.validate(told, "sdk")
        assert told["flavours"] == ["shared"] and told["verification"]["shared"]["passed"]
    shutil.rmtree(out / "lib")
    cli("sdk", artifact, "--flavour", "shared", "--out", out)
    assert (out / "lib").is_dir() and not (out / "left-over").exists()
    assert cli("sdk", artifact).returncode == 2
    assert cli("sdk", artifact, "--out", out, "--flavour", "both-ish").returncode == 2


@pytest.mark.slow
def test_two_sdks_of_one_artifact_are_alike(kit: Path, artifact: Path, tmp_path: Path) -> None:
    sdk(SdkOptions(artifact, tmp_path / "again", "shared"), quiet)
    for name in listing(tmp_path / "again") & listing(kit) - {"sdk.json", "Makefile", "README.md"}:
        assert (tmp_path / "again" / name).read_bytes() == (kit / name).read_bytes(), name
