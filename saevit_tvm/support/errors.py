"""Every failure a user can meet, as one sentence that says what is wrong and what to do next.

`exit_status` is what the command line returns: 1 when the work failed, 2 when the request was wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaevitError(Exception):
    """The work failed; the message is the one sentence the user sees."""

    exit_status = 1


class UsageError(SaevitError):
    """The request itself was wrong: an unknown name, an impossible size."""

    exit_status = 2


class ModelError(SaevitError):
    """A model or its weights cannot be used."""


class TargetError(SaevitError):
    """A target cannot be built for, or not run, on this machine."""


class CompileError(SaevitError):
    """The compiler could not turn the model into a library."""


class ArtifactError(SaevitError):
    """A library file is damaged, foreign, or not for this machine."""


class ParityError(SaevitError):
    """A library computes something else than PyTorch."""


class TuningError(SaevitError):
    """The search, or its store of records, cannot go on."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """An unknown name: list what there is and point at the nearest."""
    known = list(choices)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return UsageError(f"unknown {kind} '{name}': choose one of {', '.join(known)}{hint}")
