"""The cache folder: what was downloaded or compiled once, each piece complete or not there at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saevit_tvm.support.errors import TargetError

KEPT_BYTES = 1 << 30  # of one kind; what was not asked for longest goes first
DIGEST = hashlib.sha256().digest_size
_since_pruned: dict[Path, int] = {}  # bytes that this process has kept in a folder


def cache_folder() -> Path:
    """$SAEVIT_TVM_CACHE, or ~/.cache/saevit-tvm; the C++ side of OpenCL looks in the same place."""
    chosen = os.environ.get("SAEVIT_TVM_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "saevit-tvm"


@contextmanager
def made_once(name: str) -> Iterator[tuple[Path, Path | None]]:
    """The place of something in the cache and, where it is not there yet, a folder in which to make it."""
    place = cache_folder() / name
    if place.exists():
        yield place, None
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.{secrets.token_hex(6)}")
        fresh.mkdir()
    except OSError as error:
        raise TargetError(
            f"cannot write in '{place.parent}': {error.strerror}; name another folder in SAEVIT_TVM_CACHE."
        ) from error
    try:
        yield place, fresh
        for file in fresh.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            fresh.rename(place)
        except OSError:
            if not place.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(kind: str, key: str) -> bytes | None:
    """What was kept under a key; None where that is nothing, or not all of it."""
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        place = cache_folder() / kind / key
        kept = place.read_bytes()
        digest, content = kept[:DIGEST], kept[DIGEST:]
        if hashlib.sha256(content).digest() == digest:
            with suppress(OSError):  # a cache that is read only still serves
                os.utime(place)
            return content
    return None


def keep(kind: str, key: str, content: bytes) -> None:
    """Keep it under a key, whole or not at all. A cache is for speed: where it cannot be written, nothing is kept."""
    if len(content) > KEPT_BYTES - DIGEST:
        return
    with suppress(OSError, RuntimeError):
        folder = cache_folder() / kind
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{key}.{secrets.token_hex(6)}"
        try:
            with fresh.open("wb") as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            fresh.replace(folder / key)
        finally:
            fresh.unlink(missing_ok=True)
        # Looking at thousands of files takes as long as compiling a kernel, so it is done once in a while.
        total = _since_pruned.get(folder, KEPT_BYTES) + len(content)
        if total > KEPT_BYTES // 50:
            _prune(folder)
            total = 0
        _since_pruned[folder] = total


def _prune(folder: Path) -> None:
    """Drop the oldest beyond the limit, among them what writers left that were killed."""
    total = 0
    stats = {file: file.stat() for file in folder.iterdir()}
    for file in sorted(stats, key=lambda file: -stats[file].st_mtime):
        total += stats[file].st_size
        if total > KEPT_BYTES:
            file.unlink(missing_ok=True)
