"""A GPU that is not there: kernels compiled for this machine's CPU, and a driver that launches them on it.

TVM's CUDA runtime loads an artifact and launches its kernels as ever, by themselves and as a graph. What runs are the
same sources that NVIDIA's compiler makes into machine code, products on tensor cores emulated. So an artifact's
arithmetic, its launches and its memory are shown to be right; NVIDIA's machine code, and its speed, are not.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saevit_tvm.runtime.cuda.library import wheels
from saevit_tvm.support import process
from saevit_tvm.support.errors import TargetError

SOURCES = Path(__file__).parent / "cuda_driver"
DRIVER = "libcuda.so.1"
FAT_BINARY = bytes.fromhex("50ed55ba")  # how one begins
C, CXX = "cc", "g++"
_KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\((\d+)\) )?(\w+)\(")


def missing() -> str | None:
    """What is lacking, or None."""
    if _headers() is None:
        return "NVIDIA's headers are not installed: pip install 'saevit-tvm[cuda]'"
    lacking = [compiler for compiler in (C, CXX) if shutil.which(compiler) is None]
    return f"{lacking[0]} is not installed: apt install g++" if lacking else None


def driver(folder: Path) -> Path:
    """The driver, to be loaded before all else."""
    library = folder / DRIVER
    flags = ["-O1", "-Wall", "-Werror", f"-Wl,-soname,{DRIVER}"]
    _compile([C, *flags, SOURCES / "driver.c", "-o", library])
    return library


def kernels_in(source: str) -> dict[str, int]:
    """Names of the kernels of a text in CUDA C++, and threads in a block of each, 0 where the text does not say."""
    return {name: int(threads or 0) for threads, name in _KERNEL.findall(source)}


def kernels(source: str, library: Path) -> Path:
    """Kernels in CUDA C++ as a library for the driver."""
    program, names = library.with_suffix(".cpp"), kernels_in(source)
    parts = ['#include "kernels.hpp"', source, *(f"KERNEL({name})" for name in names)]
    program.write_text("\n".join(parts) + "\n")
    _compile([CXX, "-std=c++17", "-O1", "-march=native", "-w", f"-I{SOURCES}", program, "-o", library])
    return library


def environment(source: str, architecture: str, folder: Path) -> dict[str, str]:
    """Where a process finds a GPU of the architecture that runs these kernels."""
    return environment_of(kernels(source, folder / "kernels.so"), architecture, folder)


def environment_of(kernels: Path, architecture: str, folder: Path) -> dict[str, str]:
    """The same with kernels that are compiled already: one library, or a folder of those that `kernels_of` names."""
    preloaded = driver(folder)
    folders = ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    gpu = f"{architecture.removeprefix('sm_')} 13000 1"
    # By name alone, because no path in LD_PRELOAD may have a space in it.
    return {"LD_PRELOAD": preloaded.name, "LD_LIBRARY_PATH": folders, "KERNELS": str(kernels), "FAKE_GPU": gpu}


def kernels_of(library: Path, folder: Path) -> Path:
    """Where the driver looks in a folder for the kernels of a library: by a hash (FNV-1a) of its machine code."""
    data = library.read_bytes()
    start = data.index(FAT_BINARY)
    size = 16 + int.from_bytes(data[start + 8 : start + 16], "little")
    found = 0xCBF29CE484222325
    for byte in data[start : start + size]:
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return folder / f"{found:016x}.so"


def _compile(command: Sequence[Any]) -> None:
    if lacking := missing():
        raise TargetError(f"{lacking}.")
    there = _headers()
    include = [f"-I{there}", f"-I{there}/cccl", "-shared", "-fPIC"]
    done = process.run([*command, *include])
    if done.returncode:
        words = process.first_error(done.stderr, f"status {done.returncode}")
        raise TargetError(
            f"'{command[0]}' cannot compile kernels for this CPU ({words}): g++ 9 or later is needed, and not all "
            "of CUDA is emulated."
        )


def _headers() -> Path | None:
    found = (folder / "include" for folder in wheels())
    return next((each for each in found if (each / "cuda_fp16.h").is_file()), None)
