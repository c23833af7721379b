"""NVIDIA GPUs: machine code for one architecture or for many, and PTX of the newest for those to come.

What a kernel may take for granted of each is in `schedules/machines/nvidia.py`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from typing import Any

from saevit_tvm.targets.arm import ARM_TARGETS
from saevit_tvm.targets.base import Target
from schedules.machines.nvidia import ARCHITECTURES, WARP, Architecture

# What the target "cuda" is compiled for. Machine code runs on later architectures of the same generation only.
EVERYWHERE = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
JETSON = "sm_87"


@dataclass(frozen=True)
class CUDATarget(Target):
    """A target whose kernels run on the GPU; the library holds machine code for each of `architectures`."""

    architectures: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """The architecture decides the best schedule; that of the oldest is what all have in common."""
        return f"cuda-{self.tvm['arch']}"

    def computing_in(self, dtype: str) -> CUDATarget:
        """Of many architectures those whose tensor cores can; float32 needs none."""
        super().computing_in(dtype)
        able = tuple(sm for sm in self.architectures if dtype in _dtypes(sm))
        return replace(self, architectures=able, tvm=_description(ARCHITECTURES[able[0]], self.triple))


def cuda_targets() -> list[CUDATarget]:
    return [_everywhere(), *(_one(ARCHITECTURES[sm]) for sm in EVERYWHERE), _jetson()]


CUDA_NAMES = ("cuda", *(f"cuda-{sm}" for sm in EVERYWHERE), "jetson-orin")


def _everywhere() -> CUDATarget:
    return _here("cuda", "NVIDIA GPUs since Turing: machine code for each, PTX for later ones", EVERYWHERE)


def _one(architecture: Architecture) -> CUDATarget:
    return _here(f"cuda-{architecture.sm}", f"NVIDIA {architecture.summary}", (architecture.sm,))


def _here(name: str, summary: str, architectures: tuple[str, ...]) -> CUDATarget:
    """A GPU beside a CPU like this machine's."""
    return CUDATarget(
        name=name,
        summary=summary,
        tvm=_description(ARCHITECTURES[architectures[0]], f"{platform.machine()}-linux-gnu"),
        arch=platform.machine(),
        kind="cuda",
        dtypes=_dtypes(architectures[-1]),
        proof="cuda",
        architectures=architectures,
    )


def _jetson() -> CUDATarget:
    (host,) = (target for target in ARM_TARGETS if target.name == "jetson-orin-cpu")
    return CUDATarget(
        name="jetson-orin",
        summary=f"NVIDIA {ARCHITECTURES[JETSON].summary}, with its 64-bit ARM CPU",
        tvm=_description(ARCHITECTURES[JETSON], host.tvm["mtriple"]),
        arch=host.arch,
        features=host.features,
        kind="cuda",
        dtypes=_dtypes(JETSON),
        proof="cuda",
        linkers=host.linkers,
        architectures=(JETSON,),
    )


def _dtypes(sm: str) -> tuple[str, ...]:
    return ("float32", *ARCHITECTURES[sm].tensor_cores)


def _description(architecture: Architecture, triple: str) -> dict[str, Any]:
    return {
        "kind": "cuda",
        "arch": architecture.sm,
        "max_threads_per_block": architecture.threads,
        "max_shared_memory_per_block": architecture.shared_bytes,
        "registers_per_block": architecture.registers,
        "thread_warp_size": WARP,
        # The plainest CPU of its kind: the host part is a list of calls.
        "host": {"kind": "llvm", "mtriple": triple},
    }
