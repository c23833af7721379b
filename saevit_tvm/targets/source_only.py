"""GPUs whose kernels TVM only writes down: sources and the host part's object files, for a project elsewhere to build.

Nothing of this is run here. They take for granted what every GPU of the last ten years has, and are told apart from
OpenCL by the language of their kernels alone.
"""

from __future__ import annotations

from typing import Any

from saevit_tvm.targets.opencl import OpenCLTarget
from schedules.machines.gpus import GENERIC


def _written(name: str, what: str, arch: str, triple: str) -> OpenCLTarget:
    return OpenCLTarget(
        name=name,
        summary=f"{what}: sources and object files, not run here",
        tvm=_description(name, triple),
        arch=arch,
        kind=name,
        proof="none",
        linkers=(),
        output="objects",
    )


def _description(kind: str, triple: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "device": "generic-opencl",  # whose limits are those that all have
        "max_num_threads": GENERIC.work_group,
        "max_shared_memory_per_block": GENERIC.local_bytes,
        "host": {"kind": "llvm", "mtriple": triple},
    }


SOURCE_TARGETS = (
    _written("metal", "Apple GPUs through Metal", "arm64", "arm64-apple-macos"),
    _written("webgpu", "browsers through WebGPU", "wasm32", "wasm32-unknown-unknown-wasm"),
)
