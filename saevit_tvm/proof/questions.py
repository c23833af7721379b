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

from saevit_tvm.runtime.tensors import Inputs
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
        return _divided(self._answered, self._asked)


def ask(
    module: str,
    arguments: Sequence[str],
    inputs: Sequence[Inputs],
    scratch: Path,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Reply:
    """Run `python -m module ARGUMENTS` on the inputs: see `answer`."""
    asked, answered = scratch / "inputs.npz", scratch / "outputs.npz"
    np.savez(asked, *(array for each in inputs for array in each))
    done = process.run_apart(
        [sys.executable, "-m", module, *arguments, str(len(inputs)), asked, answered],
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": import_path(), **(environment or {})},
    )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line[0].isspace()]
    return Reply(done.returncode, lines[-1] if lines else "no reason was given", answered, len(inputs))


def answer(respond: Callable[..., list[np.ndarray]]) -> None:
    """The other side: what `respond(*ARGUMENTS, inputs)` gives for all inputs, one after the other."""
    die_with_parent()
    *arguments, count, asked, answered = sys.argv[1:]
    try:
        np.savez(answered, *respond(*arguments, [tuple(each) for each in _divided(Path(asked), int(count))]))
    except SaevitError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


def _divided(file: Path, count: int) -> Answers:
    """The arrays in a file, as many for each of `count` inferences."""
    with np.load(file) as saved:
        found = [saved[f"arr_{index}"] for index in range(len(saved.files))]
    each = len(found) // count
    return [found[start : start + each] for start in range(0, len(found), each)]
