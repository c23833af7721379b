"""Devices behind an OpenCL driver: the kernels are OpenCL C, which the driver compiles; the host part is a CPU's.

Limits are what a kernel may take for granted; a device that has more runs it all the same.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import Any

from saevit_tvm.runtime.opencl.driver import devices
from saevit_tvm.targets.base import Target

GENERIC = "generic-opencl"


@dataclass(frozen=True)
class OpenCLTarget(Target):
    """A target whose kernels run on the device and whose host part only calls them.

    `wave` is how many work-items the device runs in lockstep, or a few times that.
    """

    wave: int = 64

    @property
    def fingerprint(self) -> str:
        """The device and its limits decide the best schedule, the host's CPU does not."""
        return re.sub(r"[^A-Za-z0-9_.+-]+", "_", f"opencl-{self.name}-{self.tvm['max_num_threads']}")


def generic_opencl() -> Target:
    """Any OpenCL 1.2 device: the work-group size and local memory that all GPUs of the last ten years have."""
    found = devices()
    return OpenCLTarget(
        name=GENERIC,
        summary="any OpenCL 1.2 device" + (f", here {found[0].name}" if found else ""),
        tvm=_description(work_group=256, local_memory=16384),
        arch=platform.machine(),
        kind="opencl",
        proof=found[0].proof if found else "device",
    )


def _description(work_group: int, local_memory: int) -> dict[str, Any]:
    return {
        "kind": "opencl",
        "max_num_threads": work_group,
        "max_threads_per_block": work_group,
        "max_shared_memory_per_block": local_memory,
        # The plainest CPU of its kind: the host part is a list of calls.
        "host": {"kind": "llvm", "mtriple": f"{platform.machine()}-linux-gnu"},
    }
