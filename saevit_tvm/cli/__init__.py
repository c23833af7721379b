"""The command line: it parses, calls a verb and prints; what is done lives in `verbs`.

`saevit-tvm --help` must be quick, so nothing heavier than click is imported before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point: run one command and leave with its exit status."""
    from saevit_tvm.cli.guard import Guard

    with Guard() as guard:
        from saevit_tvm.cli.app import invoke

        guard.status = invoke(sys.argv[1:] if argv is None else list(argv), guard)
    sys.exit(guard.status)
