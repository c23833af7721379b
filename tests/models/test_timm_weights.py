"""Trained weights of timm's models: the real timm and its hub's client, a cache of ours, and no network."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from saevit_tvm.models import timm_weights
from saevit_tvm.models.weights import digest, randomise
from saevit_tvm.support.errors import UsageError

ROOT = Path(__file__).parents[2]
NAMES_OF_TORCHVISION = ROOT / "benchmarks" / "stand_in"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(NAMES_OF_TORCHVISION)
    return pytest.importorskip("timm")


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """The environment in which the hub has this cache, empty as yet, and cannot be reached."""
    pytest.importorskip("huggingface_hub")
    paths = os.pathsep.join([str(NAMES_OF_TORCHVISION), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": NOBODY, "PYTHONPATH": paths}


@pytest.mark.slow
def test_weights_in_the_cache_need_no_network(cli, timm, hub: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained = timm.create_model("test_vit").eval()
    randomise(trained, seed=5, image_size=(160, 160))
    folder = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(trained.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")

    built = cli("build", "--model", "timm:test_vit", "--pretrained", "--name", "v", cwd=tmp_path, env=hub)
    assert built.returncode == 0, built.stderr
    assert "weights   trained, timm/test_vit.r160_in1k" in built.stdout and "random:" not in built.stdout
    manifest = json.loads((tmp_path / "out" / "v.json").read_text())
    assert manifest["weights"] == {"source": "pretrained", "from": "timm/test_vit.r160_in1k"}
    assert manifest["weights_digest"] == digest(trained) and manifest["verification"]["passed"]
    assert manifest["labels"][0] == "tench, Tinca tinca" and len(manifest["labels"]) == 1000
    assert json.loads(cli("verify", "out/v.so", "--json", cwd=tmp_path, env=hub).stdout)["reference"] == "pytorch"


@pytest.mark.slow
def test_without_a_network_there_is_one_sentence(cli, timm, hub: dict[str, str]) -> None:
    done = cli("build", "--model", "timm:test_vit", "--pretrained", env=hub)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "the trained weights of 'test_vit' cannot be fetched from timm/test_vit.r160_in1k (" in done.stderr
    assert "fill the cache that HF_HUB_CACHE names, or give --weights FILE." in done.stderr


def test_a_host_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_weights, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError, match="timed out"):
        timm_weights._reach(f"http://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(
    "name, num_classes, words",
    [
        ("test_vit.other", None, "timm has no weights 'test_vit.other' .*: see timm.list_pretrained"),
        ("test_vit", 10, "'test_vit' know 1000 classes, not 10: leave out --classes"),
        ("vit_base_patch16_18x2_224", None, "timm has no trained weights for 'vit_base_patch16_18x2_224'"),
    ],
)
def test_weights_that_there_are_not(timm, name: str, num_classes: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        timm_weights.fetch(name, num_classes)
