"""The command line: it parses, calls a verb and prints; what is done lives in `verbs`.

`saevit-tvm --help` must be quick, so nothing heavier than click is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from saevit_tvm.cli.guard import Guard


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point: run one command and leave with its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        from saevit_tvm.cli.guard import Guard
    except KeyboardInterrupt:
        os._exit(130)

    def work(guard: Guard) -> int:
        from saevit_tvm.cli.app import invoke
        from saevit_tvm.support.child import collect_seldom
        from saevit_tvm.support.tvm_first import load_tvm_first

        collect_seldom()
        load_tvm_first()
        return invoke(arguments, guard)

    sys.exit(Guard().run(work))
