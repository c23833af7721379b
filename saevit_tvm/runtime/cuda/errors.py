"""Errors of CUDA as sentences. The driver gives a number, TVM's runtime its name or, from the CUDA runtime, the number.

Numbers and names are those of CUresult in cuda.h; the runtime's are the same, but for the one that it has alone.
"""

from __future__ import annotations

import re

OLD_DRIVER, NO_DEVICE = 35, 100
LOST = "the GPU was lost while it computed: start the process again, and see with nvidia-smi what became of it"

_TABLE: dict[str, dict[int, str]] = {
    "the GPU is out of memory: build a smaller --batch, or end what else runs on it": {2: "OUT_OF_MEMORY"},
    "CUDA does not survive a fork: start processes with 'spawn', or load the artifact in each of them": {
        3: "NOT_INITIALIZED"
    },
    "the driver finds no NVIDIA GPU: see with nvidia-smi whether one is there and free": {NO_DEVICE: "NO_DEVICE"},
    "the NVIDIA driver is too old: install one for CUDA 13 (580 or later)": {
        OLD_DRIVER: "INSUFFICIENT_DRIVER",
        36: "CALL_REQUIRES_NEWER_DRIVER",
        222: "UNSUPPORTED_PTX_VERSION",
        803: "SYSTEM_DRIVER_MISMATCH",
        804: "COMPAT_NOT_SUPPORTED_ON_DEVICE",
    },
    "the artifact holds no code for this GPU's architecture: build it with --target cuda": {
        209: "NO_BINARY_FOR_GPU",
        218: "INVALID_PTX",
    },
    "the GPU has fewer registers or less shared memory than the artifact's target: build for this GPU": {
        701: "LAUNCH_OUT_OF_RESOURCES"
    },
    LOST: {
        46: "DEVICE_UNAVAILABLE",
        214: "ECC_UNCORRECTABLE",
        700: "ILLEGAL_ADDRESS",
        702: "LAUNCH_TIMEOUT",
        709: "CONTEXT_IS_DESTROYED",
        714: "HARDWARE_STACK_ERROR",
        715: "ILLEGAL_INSTRUCTION",
        716: "MISALIGNED_ADDRESS",
        717: "INVALID_ADDRESS_SPACE",
        718: "INVALID_PC",
        719: "LAUNCH_FAILED",
    },
}
_SENTENCES = {code: sentence for sentence, codes in _TABLE.items() for code in codes}
_CODES = {name: code for codes in _TABLE.values() for code, name in codes.items()}


def of_code(code: int) -> str:
    """What a status means."""
    return _SENTENCES.get(code, f"CUDA failed with status {code}: see what nvidia-smi says of the GPU and its driver")


def of_words(words: str) -> str | None:
    """What an error of TVM's runtime means, if it comes from CUDA."""
    if found := re.search(r"CUDA Runtime Error: \w+ \((\d+)\)", words):
        return of_code(int(found[1]))
    if found := re.search(r"\bCUDA_ERROR_(\w+)", words):
        code = _CODES.get(found[1])
        return of_code(code) if code else f"CUDA failed with {found[0]}: see what nvidia-smi says of the GPU"
    return None
