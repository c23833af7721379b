"""Devices behind an OpenCL driver: the kernels are OpenCL C, which the driver compiles; the host part is a CPU's.

Which GPUs there are, and what a kernel may take for granted of each, is in `schedules/machines/gpus.py`. `mali` and
`adreno` take for granted what all of their family have; a device that has more runs it all the same.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from typing import Any

from saevit_tvm.runtime.opencl.driver import devices
from saevit_tvm.targets.arm import ARM_TARGETS
from saevit_tvm.targets.base import Target
from schedules.machines.gpus import GPU, GPUS, LIMITS

GENERIC = "generic-opencl"
DTYPES = ("float32", "float16")
OPENCL_NAMES = tuple(LIMITS)


@dataclass(frozen=True)
class OpenCLTarget(Target):
    """A target whose kernels run on the device and whose host part only calls them."""

    @property
    def fingerprint(self) -> str:
        """The device and its limits decide the best schedule, the host's CPU does not."""
        return re.sub(r"[^A-Za-z0-9_.+-]+", "_", f"opencl-{self.name}-{self.tvm['max_num_threads']}")


def opencl_targets() -> list[OpenCLTarget]:
    """The machine's own device, if any, decides what a proof on it is called."""
    return [_generic(), *MOBILE]


def _generic() -> OpenCLTarget:
    found = devices()
    return OpenCLTarget(
        name=GENERIC,
        summary="any OpenCL 1.2 device" + (f", here {found[0].name}" if found else ""),
        tvm=_description(GENERIC, f"{platform.machine()}-linux-gnu"),
        arch=platform.machine(),
        kind="opencl",
        dtypes=DTYPES,
        proof=found[0].proof if found else "device",
    )


def _mobile(name: str, summary: str, host: Target) -> OpenCLTarget:
    """A mobile GPU beside a 64-bit ARM CPU, which the host part is linked for as for that CPU alone."""
    return OpenCLTarget(
        name=name,
        summary=summary,
        tvm=_description(name, host.tvm["mtriple"]),
        arch=host.arch,
        features=host.features,
        kind="opencl",
        dtypes=DTYPES,
        proof="device",
        linkers=host.linkers,
        link_flags=host.link_flags,
    )


def _description(name: str, triple: str) -> dict[str, Any]:
    limits = LIMITS[name]
    return {
        "kind": "opencl",
        "device": name,
        "max_num_threads": limits.work_group,
        "max_threads_per_block": limits.work_group,
        "max_shared_memory_per_block": limits.local_bytes,
        # The plainest CPU of its kind: the host part is a list of calls.
        "host": {"kind": "llvm", "mtriple": triple},
    }


def _named() -> list[OpenCLTarget]:
    """The families, with the system that most of their users have, and the GPUs, with the system of their chip."""
    hosts = {target.name: target for target in ARM_TARGETS}
    board, phone = hosts["arm64"], hosts["android-arm64"]
    return [
        _mobile("mali", "Mali GPUs (Bifrost, Valhall) of boards with 64-bit ARM Linux", board),
        _mobile("adreno", "Adreno GPUs (6xx, 7xx, 8xx) of phones with Android", phone),
        *(_mobile(gpu.name, _summary(gpu), phone if gpu.android else board) for gpu in GPUS),
    ]


def _summary(gpu: GPU) -> str:
    return f"the {gpu.cores}-core GPU of {gpu.chip}, {'Android' if gpu.android else 'Linux'}"


MOBILE = tuple(_named())
