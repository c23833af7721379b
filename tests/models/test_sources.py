"""Opening models: what is known of one before it is compiled, and what each wrong request is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from saevit_tvm.models.opening import open_model, with_labels
from saevit_tvm.models.weights import save_state, shipped
from saevit_tvm.runtime.preprocess import load_image
from saevit_tvm.support.errors import ModelError, SaevitError, UsageError

ROOT = Path(__file__).parents[2]


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


# Registered models --------------------------------------------------


@pytest.mark.slow
def test_a_name_gives_a_model_with_random_weights() -> None:
    source = open_model("saevit_micro", batch=2, image_size=(57, 91), num_classes=5, seed=3)
    assert source.input_shape == (2, 3, 57, 91)
    assert source.output_names == ("logits",)
    assert source.recipe == {
        "model": "saevit_micro",
        "batch": 2,
        "image_size": [57, 91],
        "num_classes": 5,
        "features_only": False,
    }
    assert source.weights == {"source": "random", "seed": 3}
    assert source.regions == {"saa": 4, "ciffn": 4, "dwsconv": 4}
    assert source.preprocessing["image_size"] == [57, 91]
    assert source.labels is None and source.onnx is None and not source.module.training
    x = noise(source.input_shape)
    (logits,) = source.reference(x)
    assert logits.shape == (2, 5) and logits.dtype == np.float32
    with torch.no_grad():
        exported = source.exported().module()(torch.from_numpy(x))
    np.testing.assert_allclose(exported.numpy(), logits, atol=1e-6)


def test_a_recipe_recreates_the_same_weights() -> None:
    source = open_model("saevit_micro", image_size=64, seed=1)
    recipe = json.loads(json.dumps(source.recipe))
    again = open_model(
        recipe["model"],
        batch=recipe["batch"],
        image_size=recipe["image_size"],
        num_classes=recipe["num_classes"],
        features_only=recipe["features_only"],
        seed=1,
    )
    assert again.weights_digest == source.weights_digest != open_model("saevit_micro", seed=2).weights_digest


def test_features_only() -> None:
    source = open_model("saevit_micro", image_size=64, features_only=True)
    assert source.output_names == ("stage1", "stage2", "stage3", "stage4")
    assert [o.shape for o in source.reference(noise(source.input_shape))] == [
        (1, 16, 16, 16),
        (1, 32, 8, 8),
        (1, 48, 4, 4),
        (1, 64, 2, 2),
    ]


def test_the_shipped_checkpoint_fills_in_everything() -> None:
    source = open_model("saevit_micro", weights="digits")
    assert source.input_shape == (1, 3, 64, 64)
    assert source.labels == tuple("0123456789")
    assert source.weights == {"source": "shipped", "name": "digits"}
    assert source.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert shipped()["digits"].stat().st_size < 1_000_000


def test_the_shipped_picture_is_a_seven() -> None:
    source = open_model("saevit_micro", weights="digits")
    (logits,) = source.reference(load_image(ROOT / "examples/digit-7.png", source.preprocessing))
    assert logits.argmax() == 7


@pytest.mark.parametrize("text", ["\n".join("abcdefghij") + "\n", json.dumps(list("abcdefghij"), indent=1)])
def test_labels_come_from_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    source = open_model("saevit_micro", image_size=32, num_classes=10)
    assert with_labels(source, tmp_path / "labels").labels == tuple("abcdefghij")


@pytest.mark.parametrize("content", [b"a\nb\n", b"\xff\xfe", b"[1, 2]", b"[", b"[" * 100_000])
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(UsageError, match="does not name the model's classes"):
        with_labels(open_model("saevit_micro", image_size=32, num_classes=3), tmp_path / "labels")


def test_the_stated_accuracy_is_true(held_out: tuple[np.ndarray, np.ndarray]) -> None:
    from safetensors import safe_open

    images, digits = held_out
    (logits,) = open_model("saevit_micro", weights="digits").reference(images)
    with safe_open(shipped()["digits"], "np") as file:
        stated = float(file.metadata()["saevit.accuracy"])
    assert (logits.argmax(1) == digits).mean() == pytest.approx(stated, abs=0.003)
    assert stated >= 0.97


def test_weights_from_a_file(tmp_path: Path) -> None:
    digits = open_model("saevit_micro", weights="digits")
    torch.save(digits.module.state_dict(), tmp_path / "mine.pt")
    source = open_model("saevit_micro", weights=tmp_path / "mine.pt")
    assert source.weights == {"source": "file", "file": "mine.pt"}
    assert source.weights_digest == digits.weights_digest
    assert source.recipe["num_classes"] == 10 and source.input_shape == (1, 3, 224, 224)
    assert open_model("saevit_micro", weights="digits", image_size=96).input_shape == (1, 3, 96, 96)


def test_a_classifier_s_weights_make_a_backbone() -> None:
    source = open_model("saevit_micro", weights="digits", features_only=True)
    assert source.labels is None and len(source.reference(noise(source.input_shape))) == 4


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("mine")
    with pytest.raises(ModelError, match="'digits' is not a weights file"):
        open_model("saevit_micro", weights="digits")


WRONG_REQUESTS: list[tuple[dict[str, Any], type[SaevitError], str]] = [
    ({"model": "saevit_xss"}, UsageError, "unknown model 'saevit_xss'.*FILE.onnx; did you mean 'saevit_xs'?"),
    ({"image_size": 0}, UsageError, "image size 0 is impossible: choose 32 to 4096"),
    ({"image_size": 1}, UsageError, "image size 1 is too small for saevit_micro: choose 32 or more"),
    ({"image_size": (64, 31)}, UsageError, "image size 64x31 is too small"),
    ({"image_size": 100_000}, UsageError, "image size 100000 is impossible"),
    ({"image_size": (1, 2, 3)}, UsageError, "is not a size"),
    ({"batch": 0}, UsageError, "batch 0 is impossible: choose 1 to 1024"),
    ({"batch": 1025}, UsageError, "batch 1025 is impossible"),
    ({"num_classes": 0}, UsageError, "0 classes are impossible"),
    ({"weights": "digit"}, UsageError, "unknown checkpoint 'digit'.*did you mean 'digits'"),
    ({"weights": "none.safetensors"}, UsageError, "there is no weights file 'none.safetensors'"),
    ({"weights": "digits", "num_classes": 7}, ModelError, "for another number of classes"),
    ({"model": "saevit_xs", "weights": "digits"}, ModelError, "weights of saevit_micro, not of saevit_xs: add --mo"),
    (
        {"pretrained": True},
        UsageError,
        "for models of timm's, and 'saevit_micro' is none: give --weights, or timm:NAME",
    ),
    ({"pretrained": True, "weights": "digits"}, UsageError, "two sources of weights: leave one out"),
]


@pytest.mark.parametrize(("request_", "kind", "sentence"), WRONG_REQUESTS)
def test_wrong_request(request_: dict[str, Any], kind: type[SaevitError], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        open_model(**{"model": "saevit_micro", **request_})


METADATA = st.fixed_dictionaries(
    {},
    optional={
        "saevit.model": st.just("saevit_micro") | st.text(max_size=5),
        "saevit.image_size": st.text(max_size=9) | st.sampled_from(["64", "[64, 96]", "[]", "0", "1e99", "[" * 9999]),
        "saevit.labels": st.text(max_size=9) | st.sampled_from(['["a"]', json.dumps(list("0123456789")), "7"]),
        "saevit.preprocessing": st.text(max_size=9)
        | st.sampled_from(["{}", "[]", '{"resize": 1}', '{"std": [1, 1, 1], "mean": 3}', '{"crop": "none"}', "null"]),
    },
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=METADATA)
def test_any_metadata_is_one_error_or_a_source_that_holds(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = tmp_path / "w.safetensors"
    save_state(open_model("saevit_micro", weights="digits").module, path, metadata)
    try:
        source = open_model("saevit_micro", weights=path)
    except ModelError:
        return
    from saevit_tvm.runtime.preprocess import check

    check(source.preprocessing)
    assert source.labels is None or len(source.labels) == 10
    assert tuple(source.preprocessing["image_size"]) == source.input_shape[2:]


def test_half_a_checkpoint(tmp_path: Path) -> None:
    state = dict(open_model("saevit_micro", weights="digits").module.state_dict())
    save_file(dict(list(state.items())[:40]), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"w.safetensors' lacks .* and \d+ more tensors"):
        open_model("saevit_micro", weights=tmp_path / "w.safetensors")


# Files --------------------------------------------------------------


class Foreign(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(self.conv(x))
        return y, y.mean((2, 3))


def save_pt2(module: torch.nn.Module, path: Path, x: torch.Tensor | None = None) -> Path:
    torch.export.save(torch.export.export(module, (torch.zeros(2, 3, 20, 24) if x is None else x,)), path)
    return path


def test_pt2(tmp_path: Path) -> None:
    module = Foreign().eval()
    path = save_pt2(module, tmp_path / "net.pt2")
    source = open_model(str(path))
    assert source.input_shape == (2, 3, 20, 24) and source.output_names == ("output0", "output1")
    assert source.recipe["model"] == "net.pt2" and source.weights == {"source": "file", "file": "net.pt2"}
    assert source.regions == {} and source.weights_digest == open_model(str(path)).weights_digest
    x = noise(source.input_shape)
    with torch.no_grad():
        expected = module(torch.from_numpy(x))
        again = source.exported().module()(torch.from_numpy(x))
    for ours, theirs, third in zip(source.reference(x), expected, again, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
        np.testing.assert_array_equal(ours, third.numpy())


def test_labels_of_files(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a\nb\nc\n")
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["y"]), helper.make_node("Flatten", ["y"], ["z"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 9, 9]), ("z", [1, 3]))]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:])), tmp_path / "net.onnx")
    for path in (save_pt2(pooled, tmp_path / "net.pt2"), tmp_path / "net.onnx"):
        assert with_labels(open_model(str(path)), tmp_path / "labels").labels == ("a", "b", "c")


@pytest.mark.parametrize("channels", [1, 4, 9])
def test_any_number_of_channels(channels: int, tmp_path: Path) -> None:
    """What makes an input of a picture is known of three channels alone."""
    source = open_model(
        str(save_pt2(torch.nn.Conv2d(channels, 4, 3), tmp_path / "net.pt2", torch.zeros(1, channels, 8, 9)))
    )
    assert source.input_shape == (1, channels, 8, 9) and source.preprocessing == {}


def test_an_artifact_s_recipe_with_the_file_at_hand(tmp_path: Path) -> None:
    """A manifest knows only the name of the file; the user says where it is."""
    path = save_pt2(Foreign().eval(), tmp_path / "net.pt2")
    assert open_model("net.pt2", weights=path, batch=2, image_size=[20, 24]).output_names == ("output0", "output1")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 64}, "takes pictures of 20x24 only"),
        ({"batch": 3}, "takes batches of 2 only"),
        ({"num_classes": 3}, "has its outputs fixed"),
        ({"features_only": True}, "has its outputs fixed"),
        ({"weights": "digits"}, "holds its own weights"),
    ],
)
def test_what_a_file_fixes_cannot_be_chosen(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    path = save_pt2(Foreign().eval(), tmp_path / "net.pt2")
    with pytest.raises(UsageError, match=sentence):
        open_model(str(path), **options)


def test_pt2_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = save_pt2(Foreign().train(), tmp_path / "net.pt2")
    with pytest.raises(ModelError, match=r"training mode: call eval\(\)"):
        open_model(str(path))


def test_pt2_that_takes_no_pictures_has_no_image_size(tmp_path: Path) -> None:
    path = save_pt2(torch.nn.Linear(7, 2).eval(), tmp_path / "net.pt2", torch.zeros(1, 7))
    source = open_model(str(path))
    assert source.input_shape == (1, 7) and source.recipe["image_size"] is None and not source.preprocessing
    with pytest.raises(UsageError, match=r"takes no pictures .*: leave out the image size"):
        open_model(str(path), image_size=7)


def test_pt2_of_complex_numbers_is_refused(tmp_path: Path) -> None:
    path = save_pt2(torch.nn.Identity().eval(), tmp_path / "net.pt2", torch.zeros(1, 7, dtype=torch.complex64))
    with pytest.raises(ModelError, match="takes complex64 as 'input': export it with tensors of float32"):
        open_model(str(path))


def save_onnx(path: Path, shape: list[Any], weight: float = 1.0) -> Path:
    kernel = numpy_helper.from_array(np.full((4, 3, 3, 3), weight, np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 4])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, [kernel])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_onnx_with_open_dimensions(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "net.onnx", ["batch", 3, "height", "width"])
    source = open_model(str(path), batch=2, image_size=(8, 10))
    assert source.input_shape == (2, 3, 8, 10) and source.output_names == ("logits",)
    assert [d.dim_value for d in source.onnx.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 8, 10]
    x = noise(source.input_shape)
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(torch.from_numpy(x), torch.ones(4, 3, 3, 3), padding=1).mean((2, 3))
    np.testing.assert_allclose(source.reference(x)[0], expected.numpy(), atol=1e-4)
    other = open_model(str(save_onnx(tmp_path / "other.onnx", [2, 3, 8, 10], 2.0)))
    assert other.weights_digest != source.weights_digest
    assert open_model(str(save_onnx(tmp_path / "open.onnx", ["n", 3, "h", "w"]))).input_shape == (1, 3, 224, 224)


def test_minus_one_leaves_an_extent_open(tmp_path: Path) -> None:
    assert open_model(str(save_onnx(tmp_path / "net.onnx", [-1, 3, 8, 10])), batch=2).input_shape == (2, 3, 8, 10)


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x07\x12"])
def test_foreign_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="is not a valid ONNX model"):
        open_model(str(tmp_path / "x.onnx"))


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_onnx(tmp_path / "net.onnx", [1, 3, 8, 8])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match="pip install onnxruntime"):
        open_model(str(path))


@pytest.mark.parametrize("name", ["none.pt2", "none.onnx"])
def test_missing_file(name: str) -> None:
    with pytest.raises(UsageError, match=f"there is no file '{name}'"):
        open_model(name)


# timm ---------------------------------------------------------------


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match="'timm:resnet18' needs timm: pip install timm torchvision"):
        open_model("timm:resnet18")


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three functions of timm that are called, so that no test needs timm and its torchvision."""
    stand_in = ModuleType("timm")

    def create_model(name: str, pretrained: bool, num_classes: int = 1000, **more: Any) -> torch.nn.Module:
        assert not pretrained
        if name == "positions":
            return Positions(more.get("img_size", (40, 40)))
        if more:
            raise TypeError(f"there is no {more}")
        module = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        module.append(torch.nn.Linear(8, num_classes))
        cropped = {"interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "squash"}
        module.pretrained_cfg = {"input_size": (3, 40, 40), "mean": (0.1, 0.2, 0.3), **cropped}
        return module

    stand_in.create_model = create_model  # type: ignore[attr-defined]
    stand_in.list_models = lambda: ["smallnet"]  # type: ignore[attr-defined]
    stand_in.is_model = lambda name: name in ("smallnet", "positions")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", stand_in)


class Positions(torch.nn.Module):
    """Has a number for every place of a picture."""

    pretrained_cfg: ClassVar = {"input_size": (3, 40, 40)}

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1, 1, *size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.place).mean((2, 3))


def test_a_timm_model_is_made_for_the_size_where_it_has_one(timm: None) -> None:
    assert open_model("timm:positions").module.place.shape == (1, 1, 40, 40)
    assert open_model("timm:positions", image_size=(24, 32)).module.place.shape == (1, 1, 24, 32)
    assert open_model("timm:smallnet", image_size=(24, 32)).input_shape == (1, 3, 24, 32)


def test_timm(timm: None, tmp_path: Path) -> None:
    source = open_model("timm:smallnet", batch=2, num_classes=5)
    assert source.input_shape == (2, 3, 40, 40) and source.output_names == ("logits",)
    assert source.preprocessing["mean"] == [0.1, 0.2, 0.3] and source.preprocessing["resize"] == "bilinear"
    assert source.preprocessing["crop_pct"] == 0.9 and source.preprocessing["crop"] == "none"
    torch.save(source.module.state_dict(), tmp_path / "w.pt")
    loaded = open_model("timm:smallnet", num_classes=5, weights=tmp_path / "w.pt", seed=9)
    assert loaded.weights_digest == source.weights_digest
    (tmp_path / "labels").write_text("a\nb\nc\nd\ne\n")
    assert with_labels(loaded, tmp_path / "labels").labels == tuple("abcde")
    with pytest.raises(UsageError, match="timm has no model 'smalnet'; near it are smallnet"):
        open_model("timm:smalnet")
    with pytest.raises(ModelError, match="timm cannot make 'smallnet' with"):
        open_model("timm:smallnet", features_only=True)
    with pytest.raises(ModelError, match="does not run on an input of 1x3x1x1"):
        open_model("timm:smallnet", image_size=1)
