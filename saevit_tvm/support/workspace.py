"""Temporary folders that never outlive a command, however it ends.

`scratch` holds intermediates; `staging` holds finished files beside their destination until they are moved
into place in one step. `abandon` removes both when there is no time to unwind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from saevit_tvm.support.errors import SaevitError, UsageError

_open: list[Path] = []
_created: list[Path] = []


def abandon() -> None:
    """Remove every temporary folder now, and the destination folders that were created for nothing."""
    for folder in list(_open):
        shutil.rmtree(folder, ignore_errors=True)
    _remove_empty(_created)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for intermediates; the libraries and tools that we call put theirs there as well."""
    with _temporary(Path(tempfile.gettempdir())) as folder:
        before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before
            os.environ.pop("TMPDIR")
            if variable is not None:
                os.environ["TMPDIR"] = variable


@contextlib.contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """A folder inside `destination`, which is created if need be, and removed again if the work fails."""
    created = _create(destination)
    _created.extend(created)
    try:
        with _temporary(destination) as folder:
            yield folder
    except BaseException:
        _remove_empty(created)
        raise
    finally:
        for folder in created:
            _created.remove(folder)


def free(*files: Path) -> None:
    """See that nothing stands where the files will go that they could not replace."""
    for file in files:
        if file.is_dir():
            raise UsageError(f"'{file}' is a directory: remove it, or choose another --name or --out.")


def place(files: list[tuple[Path, Path]]) -> None:
    """Move finished files to their names, each in one step."""
    for finished, destination in files:
        finished.replace(destination)


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    folder = parent / f".saevit-tvm-{secrets.token_hex(6)}"
    _open.append(folder)  # before it exists: a stop signal in between must not lose it
    try:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise SaevitError(f"cannot write in '{parent}': {error.strerror}.") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _open.remove(folder)


def _create(destination: Path) -> list[Path]:
    """Make the folder and its parents; those that were not there before, innermost first."""
    missing = [folder for folder in (destination, *destination.parents) if not folder.exists()]
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"'{destination}' is not a directory: give --out a folder.") from error
    except OSError as error:
        _remove_empty(missing)
        raise SaevitError(f"cannot create the folder '{destination}': {error.strerror}.") from error
    return missing


def reserve(folder: Path, room: int) -> None:
    """Find a full disk before minutes of work, not after them."""
    probe = folder / "room"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room)
    except OSError as error:
        raise SaevitError(
            f"cannot write {room / 1e6:.1f} MB to '{folder.parent}': {error.strerror}; make room or give another --out."
        ) from error
    finally:
        probe.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
