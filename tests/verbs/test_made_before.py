"""The same is not built twice; what differs in anything that counts is built."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from saevit_tvm import backends, targets
from saevit_tvm.models.identity import identity
from saevit_tvm.verbs import build as build_verb
from saevit_tvm.verbs import made_before
from saevit_tvm.verbs import sdk as sdk_verb
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.sdk import SdkOptions, sdk


def say(_line: str) -> None:
    pass


def export(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)).eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 1, 8, 8),)), path)


@pytest.mark.slow
def test_the_same_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path / "cache"))
    export(tmp_path / "net.pt2", 0)
    options = BuildOptions(str(tmp_path / "net.pt2"), out=tmp_path / "out", name="first", reuse=True)
    first = build(options, say)
    made: list[str] = []
    monkeypatch.setattr(build_verb, "_made", lambda *_: made.append("anew") or pytest.fail("it was built again"))
    again = build(dataclasses.replace(options, name="again", out=tmp_path / "other"), say)
    assert again.reused and not first.reused and not made
    assert again.artifact.read_bytes() == first.artifact.read_bytes()
    assert again.manifest_path.read_bytes() == first.manifest_path.read_bytes()
    assert (again.manifest, again.left, again.warnings) == (first.manifest, first.left, first.warnings)
    export(tmp_path / "net.pt2", 1)
    for changed in (options, dataclasses.replace(options, reuse=False)):
        with pytest.raises(pytest.fail.Exception, match="built again"):
            build(changed, say)


@pytest.mark.slow
def test_an_sdk_of_the_same_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path / "cache"))
    export(tmp_path / "net.pt2", 0)
    made = build(BuildOptions(str(tmp_path / "net.pt2"), out=tmp_path / "out", name="net"), say)
    options = SdkOptions(made.artifact, tmp_path / "first", "both", str(tmp_path / "net.pt2"), reuse=True)
    first = sdk(options, say)
    monkeypatch.setattr(sdk_verb, "_make", lambda _work: pytest.fail("it was made again"))
    again = sdk(dataclasses.replace(options, out=tmp_path / "again"), say)
    assert again["reused"] and not first["reused"]
    assert {**again, "sdk": "", "reused": ""} == {**first, "sdk": "", "reused": ""}
    for file in first["files"]:
        one, other = (tmp_path / place / file for place in ("first", "again"))
        assert one.read_bytes() == other.read_bytes() and one.stat().st_mode == other.stat().st_mode
    with pytest.raises(pytest.fail.Exception, match="made again"):
        sdk(dataclasses.replace(options, flavour="static", out=tmp_path / "third"), say)
    export(tmp_path / "net.pt2", 1)
    renamed = Path(shutil.copy(made.artifact, tmp_path / "other.so"))
    for changed in (
        options,  # other weights than before
        dataclasses.replace(options, weights=None),
        dataclasses.replace(options, artifact=renamed, weights=None),
        dataclasses.replace(options, reuse=False),
    ):
        with pytest.raises(pytest.fail.Exception, match="made again"):
            sdk(dataclasses.replace(changed, out=tmp_path / "third"), say)


def test_whatever_counts_is_in_the_key(tmp_path: Path) -> None:
    weights, labels, store = tmp_path / "w.safetensors", tmp_path / "labels.txt", tmp_path / "store"
    weights.write_bytes(b"1")
    labels.write_text("a\nb\n")
    options = BuildOptions("saevit_micro", weights=str(weights), labels=labels, store=store)
    native = targets.native()

    def key(chosen: BuildOptions, target: targets.Target) -> str | None:
        return made_before.key(vars(chosen), target)

    before = key(options, native)
    assert before == key(dataclasses.replace(options, name="other", out=tmp_path), native)
    changes = {"seed": 1, "batch": (1, 4), "dtype": "float16", "image_size": 64, "input_dtype": "uint8"}
    keys = [key(dataclasses.replace(options, **{name: value}), native) for name, value in changes.items()]
    keys.append(key(options, native.cut_for(1)))
    for file, content in ((weights, "2"), (labels, "a\nc\n"), (store / "some-cpu" / "records.jsonl", "{}\n")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        keys.append(key(options, native))
    assert len({before, *keys}) == len(keys) + 1
    assert key(dataclasses.replace(options, pretrained=True), native) is None


@pytest.mark.parametrize("target", ["cuda", "generic-opencl"])
def test_a_device_that_is_not_there_is_none(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.get(targets.get(target).kind)
    monkeypatch.setattr(type(backend), "available", lambda _self: (False, "there is none"))
    monkeypatch.setattr(type(backend), "machine", lambda _self: pytest.fail("it was asked for its name"))
    assert made_before.key(vars(BuildOptions("saevit_micro")), targets.get(target))


def test_weights_beside_an_onnx_file_count(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.arange(4096, dtype=np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4096]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="net.data", size_threshold=0)
    before = identity(str(path), None, None, False)
    data = bytearray((tmp_path / "net.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "net.data").write_bytes(data)
    assert before is not None and identity(str(path), None, None, False) != before
    path.write_bytes(b"no protobuf")
    assert identity(str(path), None, None, False) is None
