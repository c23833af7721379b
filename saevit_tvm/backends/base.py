"""What a backend is: all that differs between kinds of target, from the phases of the street to the proof of a run.

A method that is not abstract does what most backends do.
"""

from __future__ import annotations

import platform
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm

from saevit_tvm.compiler import library
from saevit_tvm.compiler.street import Compiled, Phases
from saevit_tvm.support import cpu
from saevit_tvm.support.errors import ArtifactError, TargetError
from saevit_tvm.targets import Target

Description = Mapping[str, Any]  # TVM's target JSON


@dataclass(frozen=True)
class StandIn:
    """What this CPU can run in place of a program for a device that is not here: the same kernels, called alike.

    `environment` is what its process needs. `proof` is what a run proves; None where more than a host part is emulated.
    `widened` where what the device computes in float16 is here float32.
    """

    compiled: Compiled
    by: str
    proof: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    widened: bool = False


class Backend(Phases):
    """One kind of target. Stateless: what it needs to know of a target comes as an argument."""

    device: str  # TVM's name for what runs the kernels
    numbers: tuple[int, ...]  # TVM's numbers for the devices of an inference: the kernels', then the host part's
    is_gpu = False
    graphs = False  # whether kernels are timed as an artifact launches them, from a graph
    board_files: tuple[str, ...] = ()  # that TVM's runtime takes from us, wherever it goes
    flavours: tuple[str, ...] = ()  # of an SDK
    driver = ""  # what a board needs besides what we bring, in words
    has_stand_in = False  # whether this CPU can run its kernels in a device's place
    driver_compiles = False  # whether the driver compiles a kernel when it is first run

    def launches(self, compiled: Compiled) -> dict[str, Any]:
        """What the kernels ask of the device, for models of time; an entry of the manifest."""
        return {}

    def link(self, compiled: Compiled, path: Path) -> None:
        if compiled.target.output == "objects":
            library.pack_objects(compiled.executable, compiled.target, path)
        else:
            library.link_shared(compiled.executable, compiled.target, path)

    # Candidates of tuning -----------------------------------------------

    @abstractmethod
    def space(self, kernel: tvm.IRModule, target: Description) -> Any | None:
        """The tilings of a declared kernel; None for any other, which has MetaSchedule's own space."""

    @abstractmethod
    def with_loops(self, kernel: tvm.IRModule, target: Description) -> tvm.IRModule:
        """A declared kernel by itself as its loops."""

    @abstractmethod
    def generating(self, module: tvm.IRModule, target: Description) -> AbstractContextManager[None]:
        """The setting in which a build of a model makes its kernels, for a candidate."""

    def export(self, built: Any, target: Description, path: Path, link: Any) -> None:
        """Link a candidate."""
        built.export_library(str(path), fcompile=link)

    def require_tunable(self, target: Target) -> None:
        """Raise TargetError where the device of this machine is not the one that kernels are tuned for."""

    def alike(self, one: Description, other: Description) -> bool:
        """Whether what is fast on one target is a good guess for another of this kind."""
        return False

    # This machine, and what goes to another -----------------------------

    def lacking(self) -> str | None:
        """What of a compiler is missing here besides the linker, or None."""
        return None

    def available(self) -> tuple[bool, str]:
        """Whether this machine has such a device, and if not, why not."""
        return True, "runs on this machine"

    def runs_here(self, target: Target) -> tuple[bool, str]:
        """Whether this machine can run the target's code, and if not, why not."""
        if target.arch != platform.machine():
            return False, f"needs {target.arch}, this machine is {platform.machine()}"
        missing = sorted(set(target.features) - cpu.features())
        if missing:
            return False, f"needs CPU features this machine lacks: {', '.join(missing)}"
        return self.available()

    def activate(self) -> None:
        """Give TVM's runtime in this process the device."""

    def prepare(self) -> None:
        """Compile what `activate` needs, before any candidate's time runs."""

    def names(self) -> list[str]:
        """The devices of this machine, the one that is used first."""
        return []

    def machine(self) -> str:
        """What a run on this machine's device is a run on."""
        return "this machine"

    def proof(self) -> str:
        """What such a run proves, in the manifest's words."""
        return "host"

    def stand_in(self, compiled: Compiled, folder: Path) -> StandIn:
        """The same program for this CPU; TargetError where something is lacking for it. Files go into the folder."""
        raise TargetError(f"nothing on this machine stands in for target '{compiled.target.name}'")

    def stand_in_proof(self) -> str | None:
        """What a run of what stands in would prove here."""
        return None

    def has_kernels_of(self, artifact: Path, library: Path, stand_in: StandIn) -> bool:
        """Whether an artifact has the very kernels of the library of what stands in for it."""
        return False

    def own_libraries(self) -> dict[str, Path]:
        """The same files for this machine, by name."""
        return {}

    def runtime_libraries(self) -> dict[str, Path]:
        """The part of TVM's runtime for the device, by file name."""
        return {}

    def add_to(self, folder: Path, target: Target) -> None:
        """Put these files into the folder that has TVM's runtime for the target."""

    def check_foreign(self, target: Target) -> None:
        """Raise TargetError where nobody publishes TVM's runtime with the device for another machine."""

    def check_sdk(self, what: str) -> None:
        """Raise ArtifactError where no SDK can be made for the device."""
        if not self.flavours:
            raise ArtifactError(
                f"the artifact is built for a device of kind {what}, and an SDK runs on a CPU or an OpenCL device: "
                "build one for these."
            )
