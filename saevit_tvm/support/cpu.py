"""The CPU of this machine: which features the kernel reports, and on how many cores this process may run."""

from __future__ import annotations

import os
import re
from pathlib import Path


def features() -> set[str]:
    """The feature names of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(match.group(1).split()) if match else set()


def cores() -> int:
    """The cores that this process may use; siblings of one core count twice."""
    return len(os.sched_getaffinity(0))
