"""NVIDIA's compiler as a library (NVRTC) and nvFatbin beside it, as PyPI has them: no nvcc, no host compiler.

NVRTC makes PTX for one architecture and machine code of that; nvFatbin puts many into one fat binary.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from saevit_tvm.runtime import abi
from saevit_tvm.runtime.cuda.library import wheels
from saevit_tvm.support.cpu import cores
from saevit_tvm.support.errors import CompileError, TargetError

INSTALL = "pip install 'saevit-tvm[cuda]'"
_NVRTC, _BUILTINS, _FATBIN = "libnvrtc.so.13", "libnvrtc-builtins.so.13.*", "libnvfatbin.so.13"
_HEADERS = ("cuda_fp16.h", "crt/mma.h", "cccl/cuda/std/cstdint")

_SPILLED = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", re.DOTALL
)
_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)(\s+(\w+)\()")


@dataclass(frozen=True)
class Program:
    """What the compiler made for one architecture, and bytes that each kernel spills from registers to memory."""

    architecture: str
    code: bytes
    ptx: bytes
    spills: dict[str, int]


def missing() -> str | None:
    """What the compiler lacks, or None where all is there."""
    there = folder()
    if there is None:
        return f"NVIDIA's compiler (NVRTC 13) is not installed: {INSTALL}"
    lacking = [name for name in (_NVRTC, _BUILTINS, _FATBIN) if not list((there / "lib").glob(name))]
    lacking += [name for name in _HEADERS if not (there / "include" / name).is_file()]
    return f"NVIDIA's compiler is incomplete, {lacking[0]} is missing: {INSTALL}" if lacking else None


def version() -> str:
    """The compiler's version, as it says itself."""
    nvrtc, _ = _libraries()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"NVRTC {major.value}.{minor.value}"


def cuda_runtime() -> dict[str, Path]:
    """TVM's CUDA device and the CUDA runtime from PyPI's packages, by file name, to be copied to where they are not."""
    there = folder()
    path = there / "lib" / "libcudart.so.13" if there else None
    if path is None or not path.is_file():
        raise TargetError(f"libcudart.so.13 is not installed: {INSTALL}.")
    device = abi.library_path("tvm", "tvm_runtime_cuda")
    return {path.name: path, device.name: device}


def compile_all(source: str, architectures: Sequence[str], with_ptx: bool = True) -> tuple[list[Program], bytes]:
    """Machine code for each architecture, and PTX of the last, which is the newest, or b"" where none is wanted."""
    with ThreadPoolExecutor(cores()) as pool:
        programs = list(pool.map(lambda sm: _machine_code(source, sm), architectures))
    return programs, programs[-1].ptx if with_ptx else b""


def fat_binary(programs: Sequence[Program], ptx: bytes) -> bytes:
    """All of them in one; uncompressed, so that every driver reads it and so do we."""
    _, library = _libraries()
    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 2)(b"-64", b"-compress=false")
    _fine(library.nvFatbinCreate(ctypes.byref(handle), options, 2), "nvFatbin")
    try:
        for each in programs:
            number = each.architecture.removeprefix("sm_").encode()
            _fine(
                library.nvFatbinAddCubin(handle, each.code, ctypes.c_size_t(len(each.code)), number, b"kernels"),
                "nvFatbin",
            )
        if text := ptx.rstrip(b"\0"):
            number, size.value = programs[-1].architecture.removeprefix("sm_").encode(), len(text) + 1
            _fine(library.nvFatbinAddPTX(handle, text + b"\0", size, number, b"kernels", b""), "nvFatbin")
        _fine(library.nvFatbinSize(handle, ctypes.byref(size)), "nvFatbin")
        buffer = ctypes.create_string_buffer(size.value)
        _fine(library.nvFatbinGet(handle, buffer), "nvFatbin")
        return buffer.raw
    finally:
        library.nvFatbinDestroy(ctypes.byref(handle))


def _machine_code(source: str, architecture: str) -> Program:
    """Without spills where it can be: the compiler spills a few numbers, too, to have more blocks side by side."""
    program = _compile(source, architecture)
    spilling = {name for name, spilled in program.spills.items() if spilled}
    return _compile(_alone(source, spilling), architecture) if spilling else program


def _alone(source: str, kernels: Container[str]) -> str:
    """The source, where a block of these kernels may take as many registers as if it were alone on a multiprocessor."""
    return _BOUNDS.sub(
        lambda found: f"__launch_bounds__({found[1]}, 1){found[2]}" if found[3] in kernels else found[0], source
    )


def _compile(source: str, architecture: str) -> Program:
    """One call of NVRTC; machine code is made of PTX, so both are there."""
    nvrtc, there = _libraries()[0], folder()
    assert there is not None
    include = there / "include"
    options = [
        f"--gpu-architecture={architecture}",
        f"--include-path={include}",
        f"--include-path={include / 'cccl'}",
        "--ptxas-options=-v",
        "--device-as-default-execution-space",
    ]
    program = ctypes.c_void_p()
    _fine(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None), "NVRTC")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)
        log = _read(program, "ProgramLog").decode("utf-8", "replace")
        if status:
            lines = [line for line in log.splitlines() if "error" in line] or [f"status {status}"]
            raise CompileError(f"NVIDIA's compiler refuses the kernels for {architecture}: {lines[0]}")
        code, ptx = _read(program, "CUBIN"), _read(program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    spills = {name: int(stores) + int(loads) for name, stores, loads in _SPILLED.findall(log)}
    return Program(architecture, code, ptx, spills)


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    nvrtc, size = _libraries()[0], ctypes.c_size_t()
    _fine(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), "NVRTC")
    buffer = ctypes.create_string_buffer(size.value)
    _fine(getattr(nvrtc, f"nvrtcGet{what}")(program, buffer), "NVRTC")
    return buffer.raw


def _fine(status: int, who: str) -> None:
    if status:
        raise CompileError(f"{who} failed with status {status}: install it again with {INSTALL}.")


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    lacking, there = missing(), folder()
    if lacking or there is None:
        raise TargetError(f"{lacking}.")
    # NVRTC looks for its built-ins by name alone, and finds them when they are loaded already.
    for path in (there / "lib").glob(_BUILTINS):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(there / "lib" / _NVRTC)), ctypes.CDLL(str(there / "lib" / _FATBIN))


def folder() -> Path | None:
    """Where the compiler is."""
    return next((each for each in wheels() if (each / "lib" / _NVRTC).is_file()), None)
