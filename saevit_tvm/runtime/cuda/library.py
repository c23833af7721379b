"""Gives TVM's runtime its CUDA device, and sees beforehand that the GPU can run an artifact."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from saevit_tvm.runtime import abi
from saevit_tvm.runtime.cuda.driver import available, devices
from saevit_tvm.support.errors import ArtifactError, TargetError

CUDA = 2  # TVM's number for this kind of device
TEGRA = {72, 87}
_CUDART = "libcudart.so.13"


@cache
def activate() -> None:
    """Load the CUDA part of TVM's runtime into this process, or say in one sentence why it cannot be."""
    there, reason = available()
    if not there:
        raise ArtifactError(f"CUDA kernels cannot run here: {reason}.")
    abi.global_function("ffi.ModuleLoadFromFile")  # the runtime comes first
    try:
        ctypes.CDLL(_cudart(), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(abi.library_path("tvm", "tvm_runtime_cuda")), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(
            f"TVM's CUDA runtime cannot be loaded ({error}): pip install nvidia-cuda-runtime, of CUDA 13."
        ) from error


def check_device(manifest: Mapping[str, Any], path: Any) -> None:
    """Raise ArtifactError unless the first GPU can run the artifact's code."""
    there, reason = available()
    name = manifest["target"]["name"]
    if not there:
        raise ArtifactError(f"'{path}' needs an NVIDIA GPU (target {name}), and {reason}.")
    device, code = devices()[0], manifest["device_code"]
    built = [int(sm.removeprefix("sm_")) for sm in code["architectures"]]
    # PTX runs on all that came later.
    if not any(_runs(sm, device.capability) for sm in built) and device.capability < int(
        code["ptx"].removeprefix("sm_")
    ):
        raise ArtifactError(
            f"'{path}' holds code for {', '.join(code['architectures'])}, and the GPU here, {device.name}, is "
            f"sm_{device.capability}: build it with --target cuda or cuda-sm_{device.capability}."
        )


def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """TVM's foreign function interface and the CUDA runtime, for what the former's functions do not do.

    Both by the names that `activate` has made known to the process, as TVM's runtime itself calls them.
    """
    activate()
    ctypes.CDLL(str(abi.library_path("tvm_ffi")), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(None)
    return loaded, loaded


def require_architecture(name: str, architecture: str) -> None:
    """Raise TargetError unless the first GPU is of the architecture that kernels of a target are tuned for."""
    device, wanted = devices()[0], int(architecture.removeprefix("sm_"))
    if not _runs(wanted, device.capability):
        raise TargetError(
            f"kernels for target '{name}' are timed on a GPU of {architecture}, and the one here, {device.name}, is "
            f"sm_{device.capability}: tune with --target cuda-sm_{device.capability}."
        )


def _runs(built: int, capability: int) -> bool:
    """Machine code runs on its own generation, from its own minor version on, but for boards with Tegra."""
    later = built // 10 == capability // 10 and built < capability and not {built, capability} & TEGRA
    return built == capability or later


def _cudart() -> str:
    """NVIDIA's wheel brings it, or it is installed where the loader looks."""
    found = (folder / "lib" / _CUDART for folder in wheels())
    return next((str(path) for path in found if path.is_file()), _CUDART)


def wheels() -> list[Path]:
    """Where NVIDIA's wheels of CUDA 13 put everything, if they are installed."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) / "cu13" for place in (spec.submodule_search_locations or [])] if spec else []
