"""What an artifact answers, asked in a process that may crash or be killed without harm to the command.

Inputs and outputs travel as files; a refusal is one sentence and an exit status of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saevit_tvm.support import process
from saevit_tvm.support.child import die_with_parent, import_path
from saevit_tvm.support.errors import SaevitError

REFUSED = 3

Answers = list[list[np.ndarray]]  # the outputs for each input


@dataclass(frozen=True)
class Reply:
    """How the process ended, its last words, and where its outputs are."""

    status: int
    words: str
    _answered: Path
    _asked: int

    @property
    def outputs(self) -> Answers:
        with np.load(self._answered) as saved:
            found = [saved[f"arr_{index}"] for index in range(len(saved.files))]
        each = len(found) // self._asked
        return [found[start : start + each] for start in range(0, len(found), each)]


def ask(
    module: str,
    arguments: Sequence[str],
    inputs: Sequence[np.ndarray],
    scratch: Path,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Reply:
    """Run `python -m module ARGUMENTS` on the inputs: see `answer`."""
    asked, answered = scratch / "inputs.npz", scratch / "outputs.npz"
    np.savez(asked, *inputs)
    done = process.run_apart(
        [sys.executable, "-m", module, *arguments, asked, answered],
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": import_path(), **(environment or {})},
    )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line[0].isspace()]
    return Reply(done.returncode, lines[-1] if lines else "no reason was given", answered, len(inputs))


def answer(respond: Callable[..., list[np.ndarray]]) -> None:
    """The other side: what `respond(*ARGUMENTS, inputs)` gives for all inputs, one after the other."""
    die_with_parent()
    *arguments, asked, answered = sys.argv[1:]
    try:
        with np.load(asked) as saved:
            np.savez(answered, *respond(*arguments, [saved[name] for name in saved.files]))
    except SaevitError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
