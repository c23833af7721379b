"""Programs that we start: run to their end, and what to say of how that was. The child's side is in `child`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """A program's exit status and words, whatever it says; `options` are those of subprocess.run."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, **options)


def run_apart(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """The same in a session of its own: Ctrl-C reaches only us, and we end it."""
    return run(command, start_new_session=True, **options)


def killed_by(status: int) -> str | None:
    """The name of the signal that ended a process, or None where it ended by itself."""
    return signal.Signals(-status).name if status < 0 else None


def last_line(text: str, otherwise: str = "no reason was given") -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), otherwise)


def first_error(text: str, otherwise: str = "no reason was given") -> str:
    """The first line in which a compiler names an error."""
    return next((line for line in text.splitlines() if "error" in line), otherwise)


def kill_session(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and all that it has started in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
