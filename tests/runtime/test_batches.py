"""One library for several batches: any number of pictures is answered, and weights stand in it once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import saevit_tvm
from saevit_tvm.models.opening import open_model
from saevit_tvm.models.weights import shipped
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.runtime.manifest import at_batch
from saevit_tvm.support.errors import UsageError
from saevit_tvm.verbs.bench import bench
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.run import run
from saevit_tvm.verbs.sdk import SdkOptions, sdk

ROOT = Path(__file__).parents[2]


class Shared(torch.nn.Module):
    """The second input is for all rows."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum(1) + y.sum()


def quiet(_line: str) -> None:
    pass


@pytest.mark.slow
def test_any_number_of_pictures_is_answered(digits_artifact: Path, held_out: tuple[np.ndarray, np.ndarray]) -> None:
    engine = saevit_tvm.load(digits_artifact)
    assert engine.manifest["batches"] == [1, 4] and engine.inputs[0].shape == (4, 3, 64, 64)
    images = held_out[0][:10]
    (expected,) = open_model("saevit_micro", weights="digits", batch=10).reference(images)
    for count in (10, 1, 3, 2, 5, 4, 9, 8):
        answer = engine(torch.from_numpy(images[:count]))
        assert answer.shape == (count, 10)
        np.testing.assert_allclose(answer.numpy(), expected[:count], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(engine(images[:3]), engine(images[:4])[:3])
    for wrong in (images[:0], images[:2, :, :32], images[0]):
        with pytest.raises(ValueError, match="must have shape"):
            engine(wrong)


@pytest.mark.slow
def test_the_weights_are_there_once(digits_artifact: Path) -> None:
    """All but three of 76, which are packed in another way for one picture. Twice, they would be over the bound."""
    assert read_manifest(digits_artifact)["size"] < 2.5 * shipped()["digits"].stat().st_size


@pytest.mark.slow
def test_verbs_take_it_as_it_is(digits_artifact: Path, tmp_path: Path) -> None:
    pictures = [ROOT / "examples" / "digit-7.png"] * 6
    assert [each["top"][0]["label"] for each in run(digits_artifact, pictures)["results"]] == ["7"] * 6
    options = {"threads": 1, "against": [], "runs": 1, "seconds": 0.1, "weights": None, "say": quiet}
    assert bench(digits_artifact, batch=1, **options)["input_shape"] == [1, 3, 64, 64]
    assert bench(digits_artifact, **options)["input_shape"] == [4, 3, 64, 64]
    with pytest.raises(UsageError, match="takes 1, 4 pictures at a time, not 2"):
        bench(digits_artifact, batch=2, **options)
    sdk(SdkOptions(digits_artifact, tmp_path / "sdk"), quiet)
    subprocess.run(["make", "-s", "-C", tmp_path / "sdk", "classify-static"], check=True)
    told = subprocess.run([tmp_path / "sdk" / "classify-static", pictures[0]], capture_output=True, text=True)
    assert told.stdout.splitlines()[0].endswith("%  7")


def test_models_that_cannot_have_several_batches(tmp_path: Path) -> None:
    fixed = torch.export.export(torch.nn.Conv2d(3, 4, 3), (torch.zeros(2, 3, 8, 8),))
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[0], keepdims=0)
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 8, 8]))
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "mixed.onnx")
    given, size = (torch.zeros(2, 3), torch.zeros(5)), {0: torch.export.Dim("batch")}
    shared = torch.export.export(Shared(), given, dynamic_shapes=(size, None))
    torch.export.save(shared, tmp_path / "shared.pt2")
    for name, words in (
        ("shared.pt2", "takes batches of 5 only"),
        ("fixed.pt2", "takes batches of 2 only"),
        ("mixed.onnx", "has no row a picture in its output0: give one batch"),
    ):
        with pytest.raises(UsageError, match=words):
            build(BuildOptions(str(tmp_path / name), batch=(1, 2), out=tmp_path / "out"), quiet)


def test_one_batch_says_nothing_of_other_inputs() -> None:
    manifest = {"inputs": [{"shape": [1, 3]}, {"shape": [5]}]}
    assert at_batch(manifest, 1) == manifest


def test_numbers_that_are_none(cli) -> None:
    done = cli("build", "--model", "saevit_micro", "--batch", "1,x")
    assert done.returncode == 2 and "'1,x' is no number of pictures: give one, or several as in 1,4,16" in done.stderr
    done = cli("tune", "--model", "saevit_micro", "--batch", "1,4", "--export-candidates", "x.tar")
    assert done.returncode == 2 and "exported for one batch at a time: give --batch one number" in done.stderr
