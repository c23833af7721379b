"""The artifact: a library with its manifest behind it, in one file that can be judged before it is run.

    [ELF library][manifest, UTF-8 JSON][sha256 of all before][length of the manifest, u64 LE][b"SAEVIT1\\n"]

dlopen ignores what follows an ELF file. A file that is cut short, altered or foreign is found by the trailer,
and one for another machine or runtime by the manifest, so each is a sentence and never a crash.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import platform
import secrets
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from saevit_tvm.runtime import elf
from saevit_tvm.runtime import manifest as manifests
from saevit_tvm.runtime.devices import device_kind
from saevit_tvm.support import cpu
from saevit_tvm.support.errors import ArtifactError
from saevit_tvm.support.version import __version__

MAGIC = b"SAEVIT1\n"
_TAIL = struct.Struct(f"<32sQ{len(MAGIC)}s")
_CHUNK = 1 << 20


def installed_versions() -> dict[str, str]:
    """The versions that a manifest states and that loading compares; found without importing TVM."""
    found = {"saevit_tvm": __version__}
    for key, package in (("tvm", "apache-tvm"), ("tvm_ffi", "apache-tvm-ffi")):
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ArtifactError(f"{package} is not installed: install it with 'pip install {package}'.") from None
    return found


# Writing ------------------------------------------------------------


def seal(library: Path, manifest: dict[str, Any], out: Path) -> None:
    """Put the library and its manifest into `out`, and the manifest alone beside it as NAME.json.

    `format` and `size` are filled in. Whatever fails, an artifact that was there before stays as it was.
    """
    code = Path(library).read_bytes()
    machine = elf.machine(code[: elf.HEADER_SIZE])
    if machine is None:
        raise ArtifactError(f"'{library}' is no shared library: the linker produced something else.")
    manifest = {**manifest, "format": manifests.FORMAT, "size": len(code)}
    manifests.validate(manifest)
    if machine != manifest["target"]["arch"]:
        raise ArtifactError(
            f"the library was linked for {machine} but its target is {manifest['target']['arch']}: "
            "the target's compiler is not the right one."
        )
    text = manifests.encode(manifest)
    digest = hashlib.sha256(code + text).digest()
    _place(out, 0o777, [code, text, _TAIL.pack(digest, len(text), MAGIC)], text)


def seal_objects(archive: Path, manifest: dict[str, Any], out: Path) -> None:
    """The same for object files in a tar, to be linked elsewhere: the manifest joins them."""
    manifest = {**manifest, "format": manifests.FORMAT, "size": archive.stat().st_size}
    manifests.validate(manifest)
    text = manifests.encode(manifest)
    packed = io.BytesIO(archive.read_bytes())
    with tarfile.open(fileobj=packed, mode="a", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("manifest.json")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text))
    _place(out, 0o666, [packed.getvalue()], text)


def _place(out: Path, mode: int, parts: list[bytes], manifest: bytes) -> None:
    with _complete(out, mode, parts) as place_library:
        with _complete(out.with_suffix(".json"), 0o666, [manifest]) as place_manifest:
            place_manifest()
        place_library()


@contextmanager
def _complete(path: Path, mode: int, parts: list[bytes]) -> Iterator[Any]:
    """Write all of a file under another name, and yield what puts it in place; else nothing stays behind."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield lambda: temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ArtifactError(
            f"cannot write '{path}': {error.strerror or error}; choose another folder or make room."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new names last over a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading ------------------------------------------------------------


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a file that is whole, or one ArtifactError that says what the file is instead."""
    with opened(path) as (_, manifest):
        return manifest


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """The open file and its manifest: whoever uses this file uses the bytes that were checked."""
    try:
        with Path(path).open("rb") as file:
            yield file, _manifest(file, path)
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror or error}.") from error


def _manifest(file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        manifest = json.loads(_sealed_text(file, path))
        number = manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"'{path}' is damaged: its manifest cannot be read; copy it again, or build it again."
        ) from error
    if number != manifests.FORMAT:
        raise ArtifactError(
            f"'{path}' has format {number}, and this saevit-tvm {__version__} reads format "
            f"{manifests.FORMAT}: {_other_format_advice(number)}."
        )
    try:
        manifests.validate(manifest)
    except ArtifactError as error:
        raise ArtifactError(f"'{path}' cannot be used: {error}") from error
    return manifest


def _other_format_advice(number: Any) -> str:
    later = isinstance(number, int) and number > manifests.FORMAT
    return "upgrade saevit-tvm, or build the artifact with this version" if later else "build it again"


def _sealed_text(file: BinaryIO, path: str | os.PathLike[str]) -> bytes:
    """The manifest's bytes, once the digest says that not a bit of the file has changed."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ArtifactError(f"'{path}' is empty: build it again, or copy it again.")
    file.seek(0)
    if not file.read(len(elf.MAGIC)) == elf.MAGIC:
        raise ArtifactError(f"'{path}' is not a library: give the .so file that 'saevit-tvm build' wrote.")
    file.seek(max(0, size - _TAIL.size))
    tail = file.read(_TAIL.size)
    if len(tail) < _TAIL.size or not tail.endswith(MAGIC):
        raise ArtifactError(
            f"'{path}' carries no saevit-tvm manifest: it is cut short, or another program built it; "
            "build it again, or copy it again."
        )
    stated, length, _ = _TAIL.unpack(tail)
    damaged = ArtifactError(f"'{path}' is damaged: its bytes are not those that were built; copy it again.")
    if length > size - _TAIL.size:
        raise damaged
    digest = _digest(file, size - _TAIL.size - length)
    text = file.read(length)
    digest.update(text)
    if digest.digest() != stated:
        raise damaged
    return text


def _digest(file: BinaryIO, count: int) -> hashlib._Hash:
    """The running digest of the first `count` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while count and (part := file.read(min(count, _CHUNK))):
        digest.update(part)
        count -= len(part)
    return digest


# Judging ------------------------------------------------------------


def check_runnable(manifest: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise ArtifactError unless this machine's CPU and the installed TVM can run the artifact.

    Built and installed TVM must agree in major and minor version, and so must tvm-ffi: the first holds the
    virtual machine's bytecode and built-in functions still, the second the calling convention.
    """
    target = manifest["target"]
    with Path(path).open("rb") as file:
        machine = elf.machine(file.read(elf.HEADER_SIZE))
    if machine is None:
        raise ArtifactError(f"'{path}' holds no shared library: build it again.")
    if machine != platform.machine():
        raise ArtifactError(
            f"'{path}' is built for {machine} (target {target['name']}), and this machine is "
            f"{platform.machine()}: run it there, or build with --target native."
        )
    device_kind(manifest, path).check(manifest, path)
    missing = sorted(set(target["features"]) - cpu.features())
    if missing:
        raise ArtifactError(
            f"'{path}' needs CPU features that this machine lacks: {', '.join(missing)} "
            f"(target {target['name']}); build with --target native, or for a more modest target."
        )
    check_versions(manifest, path)


def check_versions(manifest: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise ArtifactError unless TVM's runtime, of the versions that are installed, can run the artifact."""
    installed = installed_versions()
    for key, package in (("tvm", "apache-tvm"), ("tvm_ffi", "apache-tvm-ffi")):
        built = manifest["versions"][key]
        if _minor(built) != _minor(installed[key]):
            raise ArtifactError(
                f"'{path}' was built with {package} {built}, and {installed[key]} is installed: "
                f"build it again, or 'pip install {package}=={built}'."
            )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
