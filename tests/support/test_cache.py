"""What is kept in the cache folder: whole or not at all, never too much, and never in the way."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from saevit_tvm.support import cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path))
    return tmp_path / "kind"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_is_kept_is_found(folder: Path) -> None:
    assert cache.load("kind", "a") is None
    cache.keep("kind", "a", b"first")
    cache.keep("kind", "a", b"second")
    assert cache.load("kind", "a") == b"second" and cache.load("kind", "b") is cache.load("other", "a") is None
    assert names(folder) == ["a"]


@pytest.mark.parametrize(
    "damage", [lambda kept: kept[:-1], lambda kept: kept[:20], lambda kept: b"", lambda kept: kept + b"x"]
)
def test_what_is_damaged_is_nothing(folder: Path, damage) -> None:
    cache.keep("kind", "a", b"content" * 100)
    (folder / "a").write_bytes(damage((folder / "a").read_bytes()))
    assert cache.load("kind", "a") is None


def test_a_killed_writer_leaves_no_half_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal; from pathlib import Path; from saevit_tvm.support import cache;"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); cache.keep('kind', 'a', b'content' * 100)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert cache.load("kind", "a") is None
    # What it has left goes as the oldest does.
    os.utime(left, (0, 0))
    monkeypatch.setattr(cache, "KEPT_BYTES", 800)
    cache.keep("kind", "a", b"content" * 100)
    assert names(folder) == ["a"]


def test_what_was_not_asked_for_longest_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT_BYTES", 500)
    for age, name in enumerate("cab"):
        cache.keep("kind", name, b"x" * 100)
        os.utime(folder / name, (age, age))
    assert cache.load("kind", "c") is not None
    cache.keep("kind", "d", b"x" * 300)
    assert names(folder) == ["c", "d"]
    cache.keep("kind", "e", b"x" * 501)
    assert names(folder) == ["c", "d"]


def test_a_disk_that_takes_no_more_is_no_error(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        cache.keep("kind", "a", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(folder) == [] and cache.load("kind", "a") is None


def test_a_folder_that_cannot_be_made_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEVIT_TVM_CACHE", "/dev/null/cache")
    cache.keep("kind", "a", b"content")
    assert cache.load("kind", "a") is None
