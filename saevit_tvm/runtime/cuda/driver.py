"""Which NVIDIA GPUs there are, asked of the driver itself: no CUDA runtime, no TVM."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from saevit_tvm.runtime.cuda.errors import NO_DEVICE, OLD_DRIVER, of_code

NEEDED = 13000  # what TVM's runtime is linked with: CUDA 13.0
_MAJOR, _MINOR = 75, 76  # attributes of a device: its compute capability


class Device(NamedTuple):
    """One GPU; `capability` like 90."""

    name: str
    capability: int


class Unavailable(Exception):
    """Why there is no GPU, in words."""


def available() -> tuple[bool, str]:
    """Whether there is a GPU and a driver that is new enough, and if not, why not."""
    try:
        _found()
    except Unavailable as error:
        return False, str(error)
    return True, "runs on this machine"


def devices() -> list[Device]:
    """Every GPU in the driver's order; empty where there is none."""
    try:
        return _found()
    except Unavailable:
        return []


def _found() -> list[Device]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise Unavailable(
            "there is no NVIDIA driver (libcuda.so.1): install it, or run on a machine with a GPU"
        ) from None
    number = ctypes.c_int()
    if status := driver.cuInit(0):
        raise Unavailable(of_code(status))
    driver.cuDriverGetVersion(ctypes.byref(number))
    if number.value < NEEDED:
        raise Unavailable(of_code(OLD_DRIVER))
    number.value = 0
    driver.cuDeviceGetCount(ctypes.byref(number))
    if not number.value:
        raise Unavailable(of_code(NO_DEVICE))
    return [_device(driver, index) for index in range(number.value)]


def _device(driver: ctypes.CDLL, index: int) -> Device:
    handle, number, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    parts = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle)
        parts.append(number.value)
    return Device(name.value.decode(errors="replace"), 10 * parts[0] + parts[1])
