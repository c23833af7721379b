"""Libraries that take frames of a camera: bytes in, and what preprocessing does to them is the first kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saevit_tvm import backends, targets
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.importers.evaluate import evaluate
from saevit_tvm.compiler.passes import TakeFrames
from saevit_tvm.models.opening import open_model
from saevit_tvm.proof.parity import INPUTS
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.runtime.engine import load
from saevit_tvm.runtime.preprocess import load_image, to_array, to_frame
from saevit_tvm.support.errors import UsageError
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.sdk import SdkOptions, sdk

PICTURE = Path(__file__).parents[2] / "examples" / "digit-7.png"


class Small(torch.nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def exported(folder: Path, channels: int = 3) -> Path:
    torch.manual_seed(0)
    path = folder / "small.pt2"
    given, batch = torch.zeros(2, channels, 12, 20), torch.export.Dim("batch", max=9)
    torch.export.save(torch.export.export(Small(channels).eval(), (given,), dynamic_shapes=({0: batch},)), path)
    return path


@pytest.fixture(scope="module")
def frames_artifact(built_once):
    return built_once("frames", weights="digits", input_dtype="uint8")


def test_the_graph_computes_what_pytorch_does_with_preprocessed_frames(tmp_path):
    source = open_model(str(exported(tmp_path)), batch=2, input_dtype="uint8")
    mod = TakeFrames(source.preprocessing)(import_model(source))
    frames = np.random.RandomState(0).randint(0, 256, (2, 12, 20, 3)).astype(np.uint8)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
    mean, deviation = (torch.tensor(source.preprocessing[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        wanted = source.module(((pixels - mean) / deviation).float()).numpy()
    (found,) = evaluate(mod, [frames])
    assert np.abs(found - wanted).max() < 1e-5 and np.abs(source.reference(frames)[0] - wanted).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rpi5", "generic-opencl"])
def test_other_targets_take_frames_of_several_batches_too(target, tmp_path):
    if backends.how_to_run(targets.get(target)) is None:
        pytest.skip(backends.why_not(targets.get(target)))
    options = BuildOptions(str(exported(tmp_path)), target, batch=(1, 2), input_dtype="uint8", out=tmp_path)
    result = build(options, lambda _: None)
    assert result.artifact.stem == f"small-{target}-uint8-input-b1-2"
    assert result.manifest["verification"]["passed"] and result.manifest["verification"]["inputs"] == INPUTS + 1
    assert result.manifest["inputs"] == [{"name": "input", "shape": [2, 12, 20, 3], "dtype": "uint8"}]


def test_pictures_get_the_same_class_as_bytes(frames_artifact):
    manifest, engine = read_manifest(frames_artifact), load(frames_artifact)
    assert manifest["inputs"] == [{"name": "input", "shape": [1, 64, 64, 3], "dtype": "uint8"}]
    assert manifest["verification"]["passed"]
    source = open_model("saevit_micro", weights="digits")
    for degrees in (0, 15, 180):
        image = Image.open(PICTURE).convert("RGB").rotate(degrees)
        (wanted,) = source.reference(to_array(image, source.preprocessing))
        assert np.abs(engine(to_frame(image, source.preprocessing)) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.slow
def test_a_c_program_feeds_bytes(frames_artifact, tmp_path):
    made = sdk(SdkOptions(frames_artifact, tmp_path / "sdk"), say=lambda _line: None)
    assert made["verification"]["static"]["passed"]
    subprocess.run(["make", "-s", "-C", tmp_path / "sdk"], check=True, capture_output=True)
    said = subprocess.run([tmp_path / "sdk" / "classify-static", PICTURE], capture_output=True, text=True, check=True)
    assert said.stdout.split()[1] == "7"


def test_the_command_feeds_bytes(frames_artifact, cli):
    answer = cli("run", frames_artifact, PICTURE, "--top", "1")
    assert answer.returncode == 0 and answer.stdout.split()[3:4] == ["7"], answer.stdout + answer.stderr
    assert load_image(PICTURE, read_manifest(frames_artifact)["preprocessing"], "uint8").dtype == np.uint8


def test_floats_are_refused(frames_artifact):
    with pytest.raises(ValueError, match=r"dtype float32, on cpu, and 'input' must have shape .*, dtype uint8"):
        load(frames_artifact)(np.zeros((1, 64, 64, 3), np.float32))


def test_what_takes_no_pictures_takes_no_frames(tmp_path):
    with pytest.raises(UsageError, match="takes no RGB pictures, so nothing says what a frame is to become"):
        open_model(str(exported(tmp_path, channels=4)), input_dtype="uint8")
    with pytest.raises(UsageError, match="unknown input 'uint4'"):
        open_model("saevit_micro", input_dtype="uint4")
