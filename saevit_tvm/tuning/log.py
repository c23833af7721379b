"""An append-only file of records that survives a kill at any moment.

A record is one line, written by one `write` under a lock and synced before `append` returns. Each line has a
checksum of its record, so damage is recognised: a torn last line is cut off, a broken line is skipped. Only
`rewrite` changes what is there, by a new file in the place of the old, and only while nobody `shares` it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saevit_tvm.support.errors import TuningError

CHECK_LENGTH = 16
HEAD, MIDDLE, END = b'{"check":"', b'","record":', b"}\n"
LOCK_NAME = ".lock"

Line = tuple[bytes, dict[str, Any] | None]  # as it stands in the file, and the record if it is one


@dataclass
class Damage:
    """What was wrong with a file: bytes of an unfinished last line, and lines that are not records."""

    torn_bytes: int = 0
    broken_lines: int = 0


def encode(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return HEAD + _check(body) + MIDDLE + body + END


def decode(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, or None when the line is not what `encode` wrote."""
    start = len(HEAD) + CHECK_LENGTH + len(MIDDLE)
    body = line[start : -len(END)]
    if line != HEAD + _check(body) + MIDDLE + body + END:
        return None
    record = json.loads(body)
    return record if isinstance(record, dict) else None


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file as durable as its content."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:CHECK_LENGTH].encode()


class Log:
    """One file of records; many processes may append and read at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage = Damage()
        self._offset = 0
        self._inode = 0

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write all the records, or none; they are on the disk when this returns."""
        self.append_chosen(lambda: records)

    def append_chosen(self, choose: Callable[[], Sequence[dict[str, Any]]]) -> None:
        """Write what is chosen while no other process can write, so that the choice may depend on what is there."""
        try:
            with self._locked() as file:
                end = self._cut_torn_tail(file)
                data = b"".join(encode(record) for record in choose())
                try:
                    if os.write(file, data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, end)
                    raise
                if end == 0:
                    _sync_folder(self.path.parent)
        except OSError as error:
            raise self._cannot_write(error) from error

    def rewrite(self, change: Callable[[list[Line]], Iterable[bytes]]) -> None:
        """Put the lines that `change` makes of the present ones in their place, in one step: all, or none."""
        staged = self.path.with_name(f".{self.path.name}.new")
        try:
            with self._locked() as old, staged.open("wb") as new:
                self._cut_torn_tail(old)
                lines = [line + b"\n" for line in self.path.read_bytes().split(b"\n")[:-1]]
                new.writelines(change([(line, decode(line)) for line in lines]))
                new.flush()
                os.fsync(new.fileno())
                staged.replace(self.path)
                _sync_folder(self.path.parent)
        except OSError as error:
            raise self._cannot_write(error) from error
        finally:
            staged.unlink(missing_ok=True)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While this is open nobody rewrites the log; any number of processes may have it open."""
        with self._holding(fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this is open nobody has the log `shared`; an error if somebody has it now."""
        try:
            with self._holding(fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield
        except BlockingIOError as error:
            raise TuningError(
                f"the tuning store {self.path.parent} is in use by a running tuner: stop it or wait, and try again."
            ) from error

    @contextmanager
    def _holding(self, how: int) -> Iterator[None]:
        """A lock beside the log: the log's own is held for moments only, and is lost when the file is replaced."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path.with_name(LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            fcntl.flock(lock, how)
            yield
        finally:
            os.close(lock)

    def _cannot_write(self, error: OSError) -> TuningError:
        return TuningError(
            f"cannot write to the tuning store {self.path} ({error.strerror}): "
            "everything measured before is kept; make room or give another folder with --store."
        )

    def torn(self) -> int:
        """Bytes of an unfinished last line; looked at under the lock, so that nobody is just writing it."""
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            data = file.read()
        return len(data) - (data.rfind(b"\n") + 1)

    def repair(self) -> None:
        """Cut off the unfinished line that a killed writer left behind, if there is one."""
        if not self.path.exists():
            return
        try:
            with self._locked() as file:
                self._cut_torn_tail(file)
        except OSError as error:
            raise TuningError(
                f"cannot open the tuning store {self.path} for writing ({error.strerror}): "
                "give another folder with --store."
            ) from error

    def new_records(self) -> Iterator[dict[str, Any]]:
        """The records added since the last call; at the first call, all."""
        try:
            with self.path.open("rb") as file:
                self._check_same_file(file.fileno())
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # unfinished: torn, or being written at this moment
                    self._offset += len(line)
                    record = decode(line)
                    if record is None:
                        self.damage.broken_lines += 1
                    else:
                        yield record
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise TuningError(
                f"cannot read the tuning store {self.path} ({error.strerror}): give another folder with --store."
            ) from error

    def _check_same_file(self, file: int) -> None:
        status = os.fstat(file)
        if self._offset and (status.st_ino != self._inode or status.st_size < self._offset):
            raise TuningError(f"the tuning store {self.path} was replaced while it was in use: start again.")
        self._inode = status.st_ino

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, open for appending, while no other process writes to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self._is_current(file):
                    yield file
                    return
            finally:
                os.close(file)

    def _is_current(self, file: int) -> bool:
        """Whether the file is still the one at the path: it may have been replaced before the lock was ours."""
        try:
            return os.fstat(file).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    def _cut_torn_tail(self, file: int) -> int:
        """End the file after its last whole line; says where that is."""
        end = size = os.fstat(file).st_size
        while end > 0 and os.pread(file, 1, end - 1) != b"\n":
            start = max(0, end - 65536)
            newline = os.pread(file, end - start, start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
        if end < size:
            os.ftruncate(file, end)
            os.fsync(file)
            self.damage.torn_bytes += size - end
        return end
