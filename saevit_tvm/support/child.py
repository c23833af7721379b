"""What every process of ours needs on its own side; it imports nothing that costs time."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def import_path() -> str:
    """What a child must have as PYTHONPATH to import what we import, wherever it stands, and whichever Python it is.

    Where this package is installed for editing, it may be found by a hook of this Python's alone.
    """
    ours = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))  # noqa: PTH120  (this module imports nothing)
    return os.pathsep.join(os.path.abspath(entry) for entry in [*sys.path, ours])  # noqa: PTH100


def collect_seldom() -> None:
    """Look for garbage less often than Python does by itself.

    Importing TVM and PyTorch makes a million objects that stay, and looking through them again and again takes an
    eighth of the time until a command begins its work. At the end Python would do so once more: that takes a second.
    """
    gc.set_threshold(50_000, 10, 10)
    atexit.register(gc.freeze)


def without_torch() -> None:
    """For a process that needs TVM and no model, before it imports TVM.

    TVM imports PyTorch wherever it is installed. Without it TVM starts in a third of the time and half of the memory.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]


def die_with_parent(parent: int | None = None) -> None:
    """Never outlive the command, however that ends; its process number shows whether it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(0)


def leave_network() -> bool:
    """From here on no connection leaves this process, where the system lets it cut itself off.

    Some runtimes report home what they are used for. To be called before any other thread is started.
    """
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) == 0:
        return True
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123  (this module imports nothing)
            file.write(text)
    return True
