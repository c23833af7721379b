"""Models whose pictures are channels last, as TensorFlow's are: which axes are pinned, and what a picture becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.importers.evaluate import evaluate
from saevit_tvm.compiler.passes import TakeFrames
from saevit_tvm.models.opening import open_model
from saevit_tvm.runtime.engine import load
from saevit_tvm.runtime.preprocess import load_image
from saevit_tvm.support.errors import UsageError
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.run import run

PICTURE = Path(__file__).parents[2] / "examples" / "digit-7.png"


def saved(path: Path, shape: list[Any]) -> Path:
    kernel = np.random.RandomState(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 4])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, [numpy_helper.from_array(kernel, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "net.onnx", ["n", "h", "w", 3])


def test_the_size_pins_height_and_width(file: Path, tmp_path: Path) -> None:
    source = open_model(str(file), batch=2, image_size=(12, 20))
    assert source.input_shape == (2, 12, 20, 3) and source.recipe["image_size"] == [12, 20]
    assert source.preprocessing["layout"] == "NHWC"
    assert open_model(str(file)).input_shape == (1, 224, 224, 3)
    fixed = str(saved(tmp_path / "fixed.onnx", [1, 12, 20, 3]))
    assert open_model(fixed, image_size=(12, 20)).input_shape == (1, 12, 20, 3)
    with pytest.raises(UsageError, match="takes pictures of 12x20 only"):
        open_model(fixed, image_size=(20, 12))


def test_a_picture_goes_in_channels_last(file: Path, tmp_path: Path) -> None:
    made = build(BuildOptions(str(file), image_size=(12, 20), out=tmp_path), lambda _line: None)
    x = load_image(PICTURE, made.manifest["preprocessing"])
    assert x.shape == (1, 12, 20, 3)
    (expected,) = open_model(str(file), image_size=(12, 20)).reference(x)
    assert np.abs(load(made.artifact)(x) - expected).max() < 1e-5
    assert run(made.artifact, [PICTURE])["results"][0]["top"][0]["class"] == expected[0].argmax()


def test_frames_are_only_normalised(file: Path) -> None:
    source = open_model(str(file), image_size=(12, 20), input_dtype="uint8")
    assert source.library_inputs[0].shape == (1, 12, 20, 3)
    frames = np.random.RandomState(0).randint(0, 256, (1, 12, 20, 3)).astype(np.uint8)
    (found,) = evaluate(TakeFrames(source.preprocessing)(import_model(source)), [frames])
    assert np.abs(found - source.reference(frames)[0]).max() < 1e-5
