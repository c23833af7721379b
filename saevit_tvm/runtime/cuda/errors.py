"""Errors of CUDA as sentences: the driver's codes, TVM's runtime's words around them, one table for both."""

from __future__ import annotations

import re
from typing import NamedTuple


class _Error(NamedTuple):
    codes: tuple[int, ...]  # of CUresult
    words: str  # a regular expression of what TVM or the CUDA runtime says
    sentence: str


_TABLE = (
    _Error(
        (2,),
        r"out of memory|OUT_OF_MEMORY|MemoryAllocation",
        "the GPU is out of memory: build a smaller --batch, or end what else runs on it",
    ),
    _Error(
        (100,),
        r"no CUDA-capable device|ERROR_NO_DEVICE|NoDevice",
        "the driver finds no NVIDIA GPU: see with nvidia-smi whether one is there and free",
    ),
    _Error(
        (3, 35, 803, 804),
        r"driver version is insufficient|InsufficientDriver|SYSTEM_DRIVER_MISMATCH"
        r"|UNSUPPORTED_PTX_VERSION|PTX was compiled with an unsupported",
        "the NVIDIA driver is too old: install one for CUDA 13 (580 or later)",
    ),
    _Error(
        (209, 218, 222),
        r"NO_BINARY_FOR_GPU|no kernel image is available|NoKernelImage|INVALID_PTX",
        "the artifact holds no code for this GPU's architecture: build it with --target cuda",
    ),
    _Error(
        (46, 214, 700, 702, 709, 715, 716, 717, 718, 719),
        r"ILLEGAL_ADDRESS|illegal memory access|LAUNCH_TIMEOUT|LAUNCH_FAILED|unspecified launch failure|ECC_"
        r"UNCORRECTABLE"
        r"|DEVICE_UNAVAILABLE|busy or unavailable|CONTEXT_IS_DESTROYED|misaligned address|fallen off",
        "the GPU was lost while it computed: start the process again, and see with nvidia-smi what became of it",
    ),
    _Error(
        (701,),
        r"LAUNCH_OUT_OF_RESOURCES|too many resources requested",
        "the GPU has fewer registers or less shared memory than the artifact's target: build for this GPU",
    ),
)


def of_code(code: int) -> str:
    """What a status of the driver means."""
    return next(
        (error.sentence for error in _TABLE if code in error.codes),
        f"the NVIDIA driver failed with status {code}: see what nvidia-smi says",
    )


def of_words(words: str) -> str | None:
    """What an error's text means, if it is one of CUDA's that we know."""
    if "cuda" not in words.lower():
        return None
    return next((error.sentence for error in _TABLE if re.search(error.words, words)), None)
