"""A library that was linked before is not compiled again, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from saevit_tvm import backends, targets
from saevit_tvm.backends.cpu import Cpu
from saevit_tvm.compiler import kept
from saevit_tvm.models.opening import ModelSource, open_model
from saevit_tvm.support import cache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(autouse=True)
def _own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(folder))


def source(seed: int = 0) -> ModelSource:
    return open_model("saevit_micro", image_size=32, seed=seed)


def library(path: Path, model: ModelSource, threads: int = 1) -> bytes:
    backends.compile_model(model, targets.native().cut_for(threads)).export(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def first(folder: Path) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAEVIT_TVM_CACHE", str(folder))
        return library(folder / "first.so", source())


class Compiling(Exception):
    """Somebody makes machine code."""


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise Compiling

    monkeypatch.setattr(Cpu, "executable", refuse)


def test_the_same_is_not_compiled_again(first: bytes, no_compiler: None, tmp_path: Path) -> None:
    assert library(tmp_path / "again.so", source()) == first
    assert (tmp_path / "again.so").stat().st_mode & 0o111


@pytest.mark.parametrize(("seed", "threads"), [(1, 1), (0, 2)])
def test_other_weights_and_another_target_are(
    first: bytes, no_compiler: None, tmp_path: Path, seed: int, threads: int
) -> None:
    with pytest.raises(Compiling):
        library(tmp_path / "other.so", source(seed), threads)


def test_so_is_what_another_linker_would_link(
    first: bytes, no_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_file", lambda program: [1, 2])
    with pytest.raises(Compiling):
        library(tmp_path / "other.so", source())


def test_a_library_that_is_damaged_is_made_anew(first: bytes, folder: Path, tmp_path: Path) -> None:
    (place,) = (folder / kept.KIND).iterdir()
    place.write_bytes(place.read_bytes()[:-1])
    assert cache.load(kept.KIND, place.name) is None
    assert library(tmp_path / "anew.so", source()) == first
    assert cache.load(kept.KIND, place.name) == first
