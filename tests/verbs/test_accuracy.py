"""How often an artifact and its original are right about pictures of known classes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

from saevit_tvm.models.opening import open_model
from saevit_tvm.proof import parity
from saevit_tvm.proof.pictures import find
from saevit_tvm.runtime.manifest import schema
from saevit_tvm.support.errors import UsageError
from saevit_tvm.verbs.accuracy import _right
from saevit_tvm.verbs.verify import verify

DIGITS = list("0123456789")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two pictures of a cat, one of a dog, and what is neither a class nor a picture."""
    for name in ("cat/b.png", "cat/deep/a.JPG", "dog/c.png", "dog/notes.txt", ".cache/d.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "data" / "README.txt").touch()
    return tmp_path / "data"


def test_folders_are_classes_in_sorted_order_or_by_their_labels(folders: Path) -> None:
    named = [("b.png", 0), ("a.JPG", 0), ("c.png", 1)]
    assert [(path.name, index) for path, index in find(folders, None, 1000).files] == named
    assert [index for _, index in find(folders, ["dog", "cow", "cat"], 3).files] == [2, 2, 0]
    assert [path.name for path, _ in find(folders, None, 1000, limit=2).files] == ["b.png", "a.JPG"]
    (folders / "emu").mkdir()
    (folders / "emu" / "e.png").touch()
    assert [path.name for path, _ in find(folders, None, 1000, limit=2).files] == ["b.png", "c.png"]  # evenly spread


@pytest.mark.parametrize(
    "text, labels, expected",
    [
        ("a b.png\t7\n\nc.png\t0\n", None, [("a b.png", 7), ("c.png", 0)]),
        ("a b.png,tench, a fish\nc.png, cock", ["cock", "tench, a fish"], [("a b.png", 1), ("c.png", 0)]),
        ("x/a.png emperor penguin\n", ["emperor penguin"], [("a.png", 0)]),
        ("a.png dog\nb.png cat\n", None, [("a.png", 1), ("b.png", 0)]),
        ("a.png 3", list("9876"), [("a.png", 3)]),
    ],
)
def test_lists(text: str, labels: list[str] | None, expected: list[tuple[str, int]], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    files = find(tmp_path / "list.txt", labels, 10).files
    assert [(path.name, index) for path, index in files] == expected
    assert all(path.is_relative_to(tmp_path) for path, _ in files)


@pytest.mark.parametrize(
    "text, labels, words",
    [
        ("a.png\n", None, "line 1 of .* names no class"),
        ("\n", None, "is empty"),
        ("a.png 10", None, "class '10' .* is number 10, counted from 0, and the artifact has 10 outputs"),
        ("a.png cat\nb.png dog", ["cat", "cow"], "class 'dog' of .* is no label of the artifact, and others are"),
    ],
)
def test_lists_that_cannot_be_used(text: str, labels: list[str] | None, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UsageError, match=words):
        find(tmp_path / "list.txt", labels, 10)


def test_folders_that_cannot_be_used(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"class 'dog' of .* is number 1, .* has 1 outputs"):
        find(folders, None, 1)
    with pytest.raises(UsageError, match=r"'.*cat/deep' holds no folders of pictures"):
        find(folders / "cat" / "deep", None, 10)
    (folders / "emu").mkdir()
    with pytest.raises(UsageError, match=r"'.*emu' holds no pictures"):
        find(folders, None, 10)
    with pytest.raises(UsageError, match=r"there is no folder or list '.*nowhere'"):
        find(tmp_path / "nowhere", None, 10)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UsageError, match=r"photo\.png' is no list of pictures"):
        find(tmp_path / "photo.png", None, 10)


def test_shares_of_right_answers() -> None:
    scores = np.tile(np.arange(10, dtype=np.float32), (4, 1))  # class 9 before 8 before 7
    scores[3, 2] = np.nan
    assert _right(scores, np.array([9, 6, 4, 9])) == {"top1": 0.25, "top5": 0.5, "not_numbers": 1}
    assert _right(np.zeros((2, 3), np.float32), np.array([0, 1])) == {"top1": 0.5, "top5": None, "not_numbers": 0}


@pytest.mark.slow
def test_an_artifact_is_as_right_as_its_original(cli, digits_artifact, held_out, tmp_path: Path) -> None:
    """Six pictures in their folders, three in a wrong one, and one that is none; four at a time."""
    chosen = [int(np.flatnonzero(held_out[1] == digit)[0]) for digit in range(9)]
    for number, index in enumerate(chosen):
        pixels = ((held_out[0][index] * 0.5 + 0.5) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        folder = tmp_path / "data" / str(number if number < 6 else 9)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "data" / "0" / "broken.png").write_bytes(b"no picture")
    (logits,) = open_model("saevit_micro", weights="digits").reference(held_out[0][chosen])
    known = np.array([0, 1, 2, 3, 4, 5, 9, 9, 9])
    five = np.argsort(-logits, 1)[:, :5] == known[:, None]

    done = cli("verify", digits_artifact, "--data", tmp_path / "data", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    jsonschema.validate(told, schema("verify"))
    rights = {"top1": pytest.approx(five[:, 0].mean()), "top5": pytest.approx(five.any(1).mean()), "not_numbers": 0}
    assert told["inputs"] == parity.INPUTS + 1  # one for the smaller batch
    assert told["passed"] and told["data"] == {
        "pictures": 9,
        "classes": 7,
        "unreadable": 1,
        "unreadable_names": [str(tmp_path / "data" / "0" / "broken.png")],
        "original": rights,
        "artifact": rights,
        "agree": 9,
    }
    assert 0.5 < told["data"]["artifact"]["top1"] < 0.8  # six of nine, if the checkpoint knows its digits

    done = cli("verify", digits_artifact, "--data", tmp_path / "data", "--limit", "5")
    assert done.stdout.startswith("5 pictures of 5 classes") and "same class for 5 of 5 pictures" in done.stdout
    with pytest.raises(UsageError, match="--limit is for pictures"):
        verify(digits_artifact, limit=5)


@pytest.mark.slow
def test_frames_and_boards_under_an_emulator_are_asked_alike(built_once, rpi5_artifact, tmp_path: Path) -> None:
    frames = built_once("frames", weights="digits", input_dtype="uint8")
    stream = np.random.RandomState(0)
    for number in range(3):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        pixels = stream.randint(0, 256, (40, 50 + number, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / str(number) / "x.png")
    for artifact, machine in ((frames, "this machine"), (rpi5_artifact, "qemu, cortex-a76 model")):
        told = verify(artifact, data=tmp_path / "data")
        assert told["passed"] and told["machine"] == machine
        assert (told["data"]["pictures"], told["data"]["agree"]) == (3, 3)
        assert told["data"]["original"] == told["data"]["artifact"]
