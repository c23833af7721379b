"""Devices behind an OpenCL driver: the kernels are OpenCL C, which the driver compiles; the host part is a CPU's.

Limits are what a kernel may take for granted; a device that has more runs it all the same.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import Any

from saevit_tvm.runtime.opencl.driver import devices
from saevit_tvm.targets.arm import ARM_TARGETS
from saevit_tvm.targets.base import Target

OPENCL_NAMES = ("generic-opencl", "mali", "adreno")


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


def opencl_targets() -> list[OpenCLTarget]:
    """The machine's own device, if any, decides what a proof on it is called."""
    return [_generic(), *MOBILE]


def _generic() -> OpenCLTarget:
    """Any OpenCL 1.2 device: the work-group size and local memory that all GPUs of the last ten years have."""
    found = devices()
    return OpenCLTarget(
        name=OPENCL_NAMES[0],
        summary="any OpenCL 1.2 device" + (f", here {found[0].name}" if found else ""),
        tvm=_description(f"{platform.machine()}-linux-gnu", work_group=256, local_memory=16384),
        arch=platform.machine(),
        kind="opencl",
        proof=found[0].proof if found else "device",
    )


def _mobile(name: str, summary: str, host: Target, wave: int) -> OpenCLTarget:
    """A mobile GPU beside a 64-bit ARM CPU, which the host part is linked for as for that CPU alone."""
    return OpenCLTarget(
        name=name,
        summary=summary,
        tvm=_description(host.tvm["mtriple"], work_group=256, local_memory=32768),
        arch=host.arch,
        features=host.features,
        kind="opencl",
        proof="device",
        linkers=host.linkers,
        link_flags=host.link_flags,
        wave=wave,
    )


def _description(triple: str, work_group: int, local_memory: int) -> dict[str, Any]:
    return {
        "kind": "opencl",
        "max_num_threads": work_group,
        "max_threads_per_block": work_group,
        "max_shared_memory_per_block": local_memory,
        # The plainest CPU of its kind: the host part is a list of calls.
        "host": {"kind": "llvm", "mtriple": triple},
    }


_HOSTS = {target.name: target for target in ARM_TARGETS}

MOBILE = (
    # Warps of 4 (Bifrost) to 16 (Valhall) work-items: 64 make a work-group that every model fills evenly.
    _mobile("mali", "Mali GPUs (Bifrost, Valhall) of boards with 64-bit ARM Linux", _HOSTS["arm64"], wave=64),
    # Waves of 64 or 128 work-items: a smaller work-group would leave half of the wide ones idle.
    _mobile("adreno", "Adreno GPUs (6xx, 7xx, 8xx) of phones with Android", _HOSTS["android-arm64"], wave=128),
)
