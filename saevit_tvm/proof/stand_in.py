"""A GPU's program where the GPU is not: this CPU runs the same kernels, called from a host part of its own.

Not shown so: what the device's compiler makes of the kernels, its memory, and any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm import backends
from saevit_tvm.proof.parity import INPUTS
from saevit_tvm.runtime.artifact import seal
from saevit_tvm.runtime.manifest import batches
from saevit_tvm.support.errors import TargetError

if TYPE_CHECKING:
    from saevit_tvm.compiler.street import Compiled
    from saevit_tvm.targets import Target

STOOD_IN_FOR = 2  # inputs: for the first, kernels of CUDA are launched by themselves, for the second as a graph
MINUTE = 16e9  # float operations of a GPU's kernels that take a CPU about as long


@dataclass(frozen=True)
class StoodIn:
    """An artifact that runs here, in an environment. `proof` is what a run proves, None where it is none."""

    artifact: Path
    environment: Mapping[str, str]
    proof: str | None
    entries: Mapping[str, Any]  # of the manifest

    @property
    def machine(self) -> str:
        """What it runs on, in words."""
        narrow = ", what is float16 there computed in float32" if "widened" in self.entries else ""
        return f"{self.entries['by']}, called from a host part for this CPU{narrow}"


def can_stand_in(target: Target) -> bool:
    return target.output == "library" and backends.get(target.kind).has_stand_in


def takes_minutes(manifest: Mapping[str, Any]) -> bool:
    """Whether this CPU would be busy for that long with a GPU's kernels."""
    inferences = STOOD_IN_FOR + len(batches(dict(manifest))) - 1
    return bool(inferences * sum(row["calls"] * row["float_ops"] for row in manifest["launches"]) > MINUTE)


def some(inputs: list[Any]) -> list[Any]:
    """The first of what a proof asks or expects, and that for smaller batches."""
    return [*inputs[:STOOD_IN_FOR], *inputs[INPUTS:]]


def made(
    manifest: Mapping[str, Any],
    compiled: Compiled,
    folder: Path,
    linked: Path | None = None,
    artifact: Path | None = None,
) -> StoodIn:
    """TargetError where something is lacking, or where the `artifact` has other kernels than were compiled.

    `linked` is the program as a library, which serves if it is for this machine.
    """
    if takes_minutes(manifest):
        raise TargetError("they would take this CPU minutes, as a smaller batch does not")
    backend = backends.get(compiled.target.kind)
    stand_in = backend.stand_in(compiled, folder)
    library = linked if stand_in.compiled is compiled else None
    if library is None:
        library = folder / "beside.so"
        stand_in.compiled.export(library)
    if artifact and not backend.has_kernels_of(artifact, library, stand_in):
        raise TargetError("they are others than this version makes of the model, with the records that are here")
    trial = folder / "stands-in.so"
    seal(library, dict(manifest) | {"target": stand_in.compiled.target.entry}, trial)
    widened = {"widened": True} if stand_in.widened and manifest["dtype"] != "float32" else {}
    return StoodIn(trial, stand_in.environment, stand_in.proof, {"by": stand_in.by, **widened})
