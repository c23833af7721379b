"""The parent's side of a runtime's own process: give an order, wait for the reply, survive its death."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.support import process
from saevit_tvm.support.child import import_path
from saevit_tvm.support.errors import SaevitError
from saevit_tvm.verbs import peers

PATIENCE = 900.0  # seconds; freezing a large model takes minutes


class PeerError(SaevitError):
    """A runtime could not do its part."""


class PeerProcess:
    """A context manager around one worker process."""

    def __init__(self, order: dict[str, Any], threads: int, folder: Path) -> None:
        self._log = folder / f"{order['do']}.log"
        python = peers.get(order["peer"]).python() or sys.executable
        # What a runtime caches in the user's home would make its second cold start a warm one.
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        path = import_path() if python == sys.executable else _package_alone(folder)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", "saevit_tvm.verbs.peers.worker", json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,  # some converters drop files where they stand
                env=os.environ | caches | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
                start_new_session=True,
            )
        self._unread = b""

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        process.kill_session(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Let the runtime have its turn."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return self.reply()

    def reply(self) -> dict[str, Any]:
        """The next reply, however long it takes within reason."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise PeerError(f"no answer within {PATIENCE:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise self._death()
            self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        message = json.loads(line)
        if "error" in message:
            raise PeerError(message["error"])
        return message

    def _death(self) -> PeerError:
        status = self._process.wait()
        killed = process.killed_by(status)
        how = f"crashed ({killed})" if killed else f"ended with status {status}"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return PeerError(f"its process {how}" + (f"; its last words: {lines[-1][:200]}" if lines else ""))


@contextlib.contextmanager
def serving(
    name: str, folder: Path, example: Path, threads: int, work: Path
) -> Iterator[tuple[PeerProcess, dict[str, Any], list[np.ndarray]]]:
    """A fresh process that takes turns, what it says of its first answer, and that answer."""
    work.mkdir()
    outputs = work / "outputs.npz"
    order = {"do": "serve", "peer": name, "folder": str(folder), "threads": threads}
    order |= {"example": str(example), "outputs": str(outputs)}
    with PeerProcess(order, threads, work) as process:
        reply = process.reply()
        with np.load(outputs) as saved:
            answer = [saved[name] for name in saved.files]
        yield process, reply, answer


def _package_alone(folder: Path) -> str:
    """A place from which another interpreter imports this package, and the rest from where it has its own."""
    place = folder / "import"
    place.mkdir(exist_ok=True)
    link = place / "saevit_tvm"
    if not link.is_symlink():
        link.symlink_to(Path(__file__).resolve().parents[2])
    return str(place)
