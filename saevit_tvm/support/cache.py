"""The cache folder: what was downloaded or compiled once, each piece complete or not there at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saevit_tvm.support.errors import TargetError


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
