"""Which OpenCL devices there are, asked of the driver itself: no compiler, no TVM."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

LIBRARIES = ("libOpenCL.so.1", "libOpenCL.so", "libmali.so.1", "libmali.so")
POCL = "Portable Computing Language"

_PLATFORM_NAME, _DEVICE_TYPE, _DEVICE_NAME, _DRIVER_VERSION, _EXTENSIONS = 0x0902, 0x1000, 0x102B, 0x102D, 0x1030
_ANY_DEVICE, _GPU = 0xFFFFFFFF, 1 << 2


class Device(NamedTuple):
    """One device and who drives it; `half` where it computes in float16."""

    name: str
    platform: str
    driver: str
    gpu: bool
    half: bool

    @property
    def proof(self) -> str:
        """What a run on it proves: right kernels on PoCL, which computes on the CPU, or the device itself."""
        return "pocl" if self.platform == POCL else "device"


def devices() -> list[Device]:
    """Every device in the plugin's order, GPUs first; empty where there is none."""
    library = _library()
    if library is None:
        return []
    found = [
        _device(library, platform, device)
        for platform in _handles(library.clGetPlatformIDs)
        for device in _handles(library.clGetDeviceIDs, platform, ctypes.c_uint64(_ANY_DEVICE))
    ]
    return sorted(found, key=lambda device: not device.gpu)


def available() -> tuple[bool, str]:
    """Whether there is an OpenCL device, and if not, why not."""
    if _library() is None:
        return False, "there is no OpenCL library (libOpenCL.so.1): install the GPU's driver, or PoCL for the CPU"
    if not devices():
        return False, "no OpenCL driver offers a device: install the GPU's driver, or PoCL for the CPU"
    return True, "runs on this machine"


def _library() -> ctypes.CDLL | None:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _handles(function: Any, *arguments: Any) -> list[ctypes.c_void_p]:
    count = ctypes.c_uint32()
    if function(*arguments, 0, None, ctypes.byref(count)) or not count.value:
        return []
    handles = (ctypes.c_void_p * count.value)()
    function(*arguments, count, handles, None)
    return [ctypes.c_void_p(handle) for handle in handles]


def _device(library: ctypes.CDLL, platform: ctypes.c_void_p, device: ctypes.c_void_p) -> Device:
    kind = ctypes.c_uint64()
    library.clGetDeviceInfo(device, _DEVICE_TYPE, ctypes.c_size_t(8), ctypes.byref(kind), None)
    return Device(
        name=_text(library.clGetDeviceInfo, device, _DEVICE_NAME),
        platform=_text(library.clGetPlatformInfo, platform, _PLATFORM_NAME),
        driver=_text(library.clGetDeviceInfo, device, _DRIVER_VERSION),
        gpu=bool(kind.value & _GPU),
        half="cl_khr_fp16" in _text(library.clGetDeviceInfo, device, _EXTENSIONS).split(),
    )


def _text(function: Callable[..., int], handle: ctypes.c_void_p, what: int) -> str:
    size = ctypes.c_size_t()
    if function(handle, what, ctypes.c_size_t(0), None, ctypes.byref(size)) or not size.value:
        return ""
    text = ctypes.create_string_buffer(size.value)
    function(handle, what, size, text, None)
    return text.value.decode(errors="replace").strip()
