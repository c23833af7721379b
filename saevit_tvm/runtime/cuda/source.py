"""What a text in CUDA C++ says of its kernels."""

from __future__ import annotations

import re

_KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\((\d+)\) )?(\w+)\(")


def kernels(source: str) -> dict[str, int]:
    """Names of kernels, and threads in a block of each, 0 where the text does not say."""
    return {name: int(threads or 0) for threads, name in _KERNEL.findall(source)}
