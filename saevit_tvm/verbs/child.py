"""What every process that a verb starts needs; it imports nothing that costs time."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def import_path() -> str:
    """What a child must have as PYTHONPATH to import what we import, wherever it stands."""
    return os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100


def die_with_parent() -> None:
    """Never outlive the command, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
