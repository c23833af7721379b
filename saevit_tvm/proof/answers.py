"""What an artifact answers, found out in a process of its own: on this CPU, or under qemu on a model of another.

Code that was just generated, or that comes from elsewhere, may crash (an instruction this CPU lacks, a bug of
the compiler); here that is a sentence and not the end of the command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm import backends
from saevit_tvm.emulators import qemu
from saevit_tvm.proof.questions import REFUSED, Answers, answer, ask
from saevit_tvm.runtime.tensors import Inputs
from saevit_tvm.support import process
from saevit_tvm.support.errors import ArtifactError


def answers(
    artifact: Path,
    inputs: Sequence[Inputs],
    scratch: Path,
    how: str | None = "host",
    environment: Mapping[str, str] | None = None,
) -> Answers:
    """The outputs for each input, from a fresh process that loads the file."""
    if how == "qemu":
        return qemu.run(artifact, inputs, scratch)
    reply = ask(__name__, [str(artifact.absolute())], inputs, scratch, environment=environment)
    if reply.status == REFUSED:
        raise ArtifactError(reply.words)
    if reply.status < 0:
        name = process.killed_by(reply.status)
        hint = "it was built for another CPU" if name == "SIGILL" else "please report the model"
        raise ArtifactError(f"'{artifact.name}' crashes when it is run ({name}): {hint}.")
    if reply.status:
        raise ArtifactError(f"'{artifact.name}' cannot be run: {reply.words}.")
    return reply.outputs


def machine(target: Mapping[str, Any], how: str | None) -> str:
    """What the artifact was run on, in words; `target` is its manifest's."""
    if how == "host":
        return backends.get(target["tvm"]["kind"]).machine()
    if how != "qemu":
        return "this machine"
    libc = ", glibc in place of Android's libc" if "android" in target["tvm"].get("mtriple", "") else ""
    return f"qemu, {target['emulator']} model{libc}"


def kind(target: Mapping[str, Any], how: str | None) -> str | None:
    """What such a run proves, in the manifest's words."""
    return backends.get(target["tvm"]["kind"]).proof() if how == "host" else how


def _run(artifact: str, inputs: list[Inputs]) -> list[np.ndarray]:
    from saevit_tvm.proof.parity import as_list
    from saevit_tvm.runtime.engine import load

    engine = load(artifact)
    return [output for x in inputs for output in as_list(engine(*x))]


if __name__ == "__main__":
    answer(_run)
