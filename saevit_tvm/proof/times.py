"""How long each kernel of an artifact takes inside an inference, found out in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saevit_tvm.proof.questions import answer, ask
from saevit_tvm.runtime.tensors import Inputs
from saevit_tvm.support.errors import ArtifactError


def kernel_times(artifact: Path, inputs: Inputs, scratch: Path) -> dict[str, float]:
    """Seconds of one inference by kernel, on one thread of this CPU."""
    reply = ask(__name__, [str(artifact.absolute())], [inputs], scratch)
    if reply.status:
        raise ArtifactError(f"'{artifact.name}' cannot be timed: {reply.words}.")
    ((names, seconds),) = reply.outputs
    totals: dict[str, float] = {}
    for name, each in zip(names, seconds, strict=True):
        totals[str(name)] = totals.get(str(name), 0.0) + float(each)
    return totals


def _times(artifact: str, inputs: list[Inputs]) -> list[np.ndarray]:
    from saevit_tvm.runtime.engine import load

    # With more threads a kernel waits for the last of them, and on a busy machine that can be any time.
    found = load(artifact, threads=1).kernel_times(*inputs[0])
    return [np.array([name for name, _ in found]), np.array([seconds for _, seconds in found])]


if __name__ == "__main__":
    answer(_times)
