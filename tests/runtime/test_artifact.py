"""Every file that is not a whole, suitable artifact is one sentence; and sealing is all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import saevit_tvm
from saevit_tvm.runtime import artifact, elf
from saevit_tvm.runtime import manifest as manifests
from saevit_tvm.support.errors import ArtifactError

property_test = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path) -> str:
    """What loading says; it must be one sentence on one line, from the check or from load alike."""
    with pytest.raises(ArtifactError) as error:
        saevit_tvm.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert error.value.exit_status == 1
    return message


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "case.so"


# Files that are not whole artifacts -------------------------------------------


def test_whole_file_is_read(sample: Any) -> None:
    manifest = artifact.read_manifest(sample.path)
    assert manifest["model"] == "sample"
    assert manifest["format"] == manifests.FORMAT
    assert manifest["size"] == sample.library.stat().st_size
    artifact.check_runnable(manifest, sample.path)


def test_layout_is_the_documented_one(sample: Any, forge_bytes: Any) -> None:
    text = sample.path.with_suffix(".json").read_bytes()
    assert sample.path.read_bytes() == forge_bytes(sample.library.read_bytes(), text)


def test_missing_file(scratch: Path) -> None:
    assert "No such file" in refusal(scratch)


def test_directory(scratch: Path) -> None:
    scratch.mkdir()
    assert "Is a directory" in refusal(scratch)


def test_empty_file(scratch: Path) -> None:
    scratch.write_bytes(b"")
    assert "is empty" in refusal(scratch)


def test_text_file(scratch: Path) -> None:
    scratch.write_text("Dear reader,\nthis is no library.\n" * 10)
    assert "is not a library" in refusal(scratch)


def test_foreign_library() -> None:
    (folder,) = util.find_spec("tvm_ffi").submodule_search_locations  # type: ignore[union-attr, misc]
    assert "another program built it" in refusal(Path(folder) / "lib" / "libtvm_ffi.so")


def test_bare_library(sample: Any) -> None:
    assert "carries no saevit-tvm manifest" in refusal(sample.library)


@property_test
@given(data=st.data())
def test_truncated_anywhere(sample: Any, scratch: Path, data: st.DataObject) -> None:
    whole = sample.path.read_bytes()
    cut = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(len(whole) - 64, len(whole) - 1)))
    scratch.write_bytes(whole[:cut])
    assert any(word in refusal(scratch) for word in ("is empty", "is not a library", "is cut short"))


@property_test
@given(data=st.data())
def test_any_changed_bit(sample: Any, scratch: Path, data: st.DataObject) -> None:
    whole = bytearray(sample.path.read_bytes())
    tail = len(whole) - sample.library.stat().st_size
    position = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(len(whole) - tail, len(whole) - 1)))
    whole[position] ^= 1 << data.draw(st.integers(0, 7))
    scratch.write_bytes(whole)
    message = refusal(scratch)
    assert any(word in message for word in ("is damaged", "is not a library", "carries no saevit-tvm"))


@property_test
@given(content=st.binary(max_size=300), disguise=st.booleans())
@example(content=b"\x7fELF", disguise=False)
@example(content=b"\xff" * 40, disguise=True)
@example(content=b"", disguise=True)
def test_arbitrary_bytes(scratch: Path, content: bytes, disguise: bool) -> None:
    scratch.write_bytes(elf.MAGIC + content + artifact.MAGIC if disguise else content)
    refusal(scratch)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@property_test
@given(text=st.one_of(st.binary(max_size=60), json_values.map(lambda value: json.dumps(value).encode())))
@example(text=b"[" * 100_000)
@example(text=b'{"format":' + b"9" * 10_000 + b"}")
@example(text=b'{"format": 1, "inputs": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(text=b'{"format": true}')
@example(text=b'{"format": 1e400}')
def test_well_sealed_nonsense(sample: Any, scratch: Path, forge_bytes: Any, text: bytes) -> None:
    scratch.write_bytes(forge_bytes(sample.library.read_bytes(), text))
    refusal(scratch)


# Whole artifacts that are not for here ----------------------------------------


def test_later_format(forged: Any) -> None:
    message = refusal(forged({"format": 7}))
    assert "has format 7" in message
    assert "reads format 1: upgrade saevit-tvm" in message


def test_manifest_without_a_key(forged: Any) -> None:
    assert "'inputs' must be array" in refusal(forged({"inputs": "x"}))


def foreign_code(sample: Any, number: int) -> bytes:
    code = bytearray(sample.library.read_bytes())
    code[18:20] = number.to_bytes(2, "little")
    return bytes(code)


@pytest.mark.parametrize(("number", "name"), [(183, "aarch64"), (243, "riscv64"), (4711, "ELF machine 4711")])
def test_other_architecture(sample: Any, forged: Any, number: int, name: str) -> None:
    message = refusal(forged(code=foreign_code(sample, number)))
    assert f"is built for {name}" in message
    assert f"this machine is {os.uname().machine}" in message


def test_object_file(sample: Any, forged: Any) -> None:
    code = bytearray(sample.library.read_bytes())
    code[16] = 1
    assert "holds no shared library" in refusal(forged(code=bytes(code)))
    assert "holds no shared library" in refusal(forged(code=elf.MAGIC))


def test_missing_cpu_feature(sample: Any, forged: Any) -> None:
    target = {
        **sample.manifest["target"],
        "name": "x86-64-v9",
        "features": ["avx", "avx4096", "mind_reading"],
    }
    message = refusal(forged({"target": target}))
    assert "lacks: avx4096, mind_reading (target x86-64-v9)" in message


def test_other_device(sample: Any, forged: Any) -> None:
    target = {**sample.manifest["target"], "name": "rocm", "tvm": {"kind": "rocm"}}
    assert "device of kind rocm" in refusal(forged({"target": target}))


@pytest.mark.parametrize(("key", "version"), [("tvm", "0.26.0"), ("tvm", "1.27.0"), ("tvm_ffi", "0.2.0")])
def test_incompatible_runtime(sample: Any, forged: Any, key: str, version: str) -> None:
    message = refusal(forged({"versions": {**sample.manifest["versions"], key: version}}))
    assert f"{version}, and {sample.manifest['versions'][key]} is installed" in message


def test_compatible_runtime(sample: Any, forged: Any) -> None:
    major, minor, *_ = sample.manifest["versions"]["tvm"].split(".")
    path = forged({"versions": {**sample.manifest["versions"], "tvm": f"{major}.{minor}.99"}})
    assert saevit_tvm.load(path)(sample.input(0)).shape == (1, 16, 64)


# Sealing ----------------------------------------------------------------------


def test_sealing_twice_gives_the_same_bytes(sample: Any, tmp_path: Path) -> None:
    shuffled = dict(reversed(sample.manifest.items()))
    artifact.seal(sample.library, shuffled, tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == sample.path.read_bytes()
    assert (tmp_path / "again.json").read_bytes() == sample.path.with_suffix(".json").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "again.so"]


def test_sealing_refuses_what_it_would_not_read(sample: Any, tmp_path: Path) -> None:
    other = {**sample.manifest, "target": {**sample.manifest["target"], "arch": "aarch64"}}
    text = tmp_path / "text.so"
    text.write_text("no library")
    for library, manifest, words in [
        (sample.library, {**sample.manifest, "outputs": []}, "'outputs' must have at least 1"),
        (sample.library, other, "linked for x86_64 but its target is aarch64"),
        (text, sample.manifest, "is no shared library"),
    ]:
        with pytest.raises(ArtifactError, match=words):
            artifact.seal(library, manifest, tmp_path / "out.so")
    assert [file.name for file in tmp_path.iterdir()] == ["text.so"]


@pytest.mark.parametrize("obstacle", ["out.so", "out.json"])
def test_a_directory_in_the_way(sample: Any, tmp_path: Path, obstacle: str) -> None:
    (tmp_path / obstacle).mkdir()
    with pytest.raises(ArtifactError, match=f"{obstacle}': Is a directory"):
        artifact.seal(sample.library, sample.manifest, tmp_path / "out.so")
    assert [file.name for file in tmp_path.iterdir()] == [obstacle]


def test_a_file_where_the_folder_should_be(sample: Any, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(ArtifactError, match="Not a directory"):
        artifact.seal(sample.library, sample.manifest, tmp_path / "out" / "x.so")


@pytest.fixture
def small_disk(tmp_path: Path, sample: Any) -> Iterator[Path]:
    """A real file system with room for one artifact, but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    pages = int(1.6 * sample.path.stat().st_size) // 4096
    command = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(sample: Any, small_disk: Path) -> None:
    out = small_disk / "out.so"
    artifact.seal(sample.library, sample.manifest, out)
    earlier = {file.name: file.read_bytes() for file in small_disk.iterdir()}
    with pytest.raises(ArtifactError, match=r"cannot write .*No space left on device; .* make room"):
        artifact.seal(sample.library, {**sample.manifest, "model": "later"}, out)
    assert {file.name: file.read_bytes() for file in small_disk.iterdir()} == earlier
    assert artifact.read_manifest(out)["model"] == "sample"


def test_disk_too_full_for_the_manifest(sample: Any, small_disk: Path) -> None:
    """The library still fits, its manifest beside it does not: neither is left."""
    room = os.statvfs(small_disk)
    taken = room.f_bavail * room.f_frsize - 4096 * -(-sample.path.stat().st_size // 4096)
    (small_disk / "ballast").write_bytes(bytes(taken))
    with pytest.raises(ArtifactError, match=r"out\.json': No space left on device"):
        artifact.seal(sample.library, sample.manifest, small_disk / "out.so")
    assert [file.name for file in small_disk.iterdir()] == ["ballast"]


def test_interrupted_sealing_leaves_nothing(sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.seal(sample.library, sample.manifest, tmp_path / "out.so")
    assert list(tmp_path.iterdir()) == []


def test_permissions_follow_the_umask(sample: Any, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        artifact.seal(sample.library, sample.manifest, tmp_path / "out.so")
    finally:
        os.umask(before)
    assert (tmp_path / "out.so").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out.json").stat().st_mode & 0o777 == 0o640
