#!/usr/bin/env python3
"""Do what a page of the documentation says, in an empty folder, and print what a reader would see.

    python scripts/follow.py docs/raspberry-pi.md

Every line after a `$ ` in a console block is given to one shell, in order; the first that fails ends it. The shell
finds this checkout in $SAEVIT_TVM, as the page says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands(page: str) -> list[str]:
    """The lines that a reader is told to type."""
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def follow(page: Path) -> int:
    lines = ["set -m"]  # job control, for the page to stop what it has started
    for command in commands(page.read_text()):
        quoted = "'" + command.replace("'", "'\\''") + "'"
        lines += [f"printf '\\n$ %s\\n' {quoted}", command, "[ $? = 0 ] || { kill $(jobs -p); exit 1; }"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script"
        script.write_text("\n".join(lines) + "\n")
        empty = Path(folder) / "empty"
        empty.mkdir()
        # One stream, so that what a command says stays where it says it.
        environment = os.environ | {"SAEVIT_TVM": str(ROOT)}
        line = ["bash", str(script)]
        return subprocess.run(line, cwd=empty, stderr=subprocess.STDOUT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(follow(Path(sys.argv[1]).resolve()))
