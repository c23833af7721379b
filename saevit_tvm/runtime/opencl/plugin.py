"""Compiles the plugin once for this machine, and puts it into TVM's runtime; or for another, to be copied there.

The headers are those of the installed TVM, so the plugin always fits the runtime that will load it; its file name is
the digest of all that it was made from, so nothing stale is ever used.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import secrets
import shutil
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from saevit_tvm.runtime import abi, elf
from saevit_tvm.runtime.opencl.driver import available
from saevit_tvm.support import process, toolchain
from saevit_tvm.support.cache import cache_folder
from saevit_tvm.support.errors import ArtifactError, TargetError

OPENCL = 4  # TVM's number for this kind of device
SOURCES = Path(__file__).with_name("plugin")
NAME = "libsaevit_opencl.so"  # beside TVM's runtime on a board, where the C programs look for it
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-Wl,-rpath,$ORIGIN", "-Wall", "-Wextra", "-Wno-unused-parameter")


@cache
def activate() -> None:
    """Give TVM's runtime in this process its OpenCL device, or say in one sentence why it cannot have one."""
    there, reason = available()
    if not there:
        raise ArtifactError(f"OpenCL kernels cannot run here: {reason}.")
    if abi.find_global_function("device_api.opencl") is None:
        # Its functions stay registered for as long as the process lives, and so must its code.
        ctypes.CDLL(str(library()), mode=os.RTLD_LOCAL | os.RTLD_NODELETE)


def library() -> Path:
    """The compiled plugin, from the cache or made now."""
    folder = cache_folder() / "plugins"
    path = folder / f"opencl-{_digest()}.so"
    if not path.is_file():
        _compile(path)
    return path


def _digest() -> str:
    digest = hashlib.sha256(repr((platform.machine(), FLAGS)).encode())
    for package in ("apache-tvm", "apache-tvm-ffi"):
        digest.update(metadata.version(package).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ArtifactError(
            "OpenCL support is compiled where it is first used, and this machine has no C++ compiler: "
            "install one (Debian: apt install g++)."
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_plugin([compiler], [_package("tvm") / "lib", _package("tvm_ffi") / "lib"], temporary)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"OpenCL support cannot be put into '{path.parent}' ({error.strerror}): "
            "make room there, or set SAEVIT_TVM_CACHE to another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def compile_for(target: toolchain.Platform, folder: Path) -> None:
    """Put the plugin for a target's board into the folder that has TVM's runtime for it."""
    made = folder / NAME
    compile_plugin(toolchain.cxx(target), [folder], made)
    if elf.read(made)[1:] != ("shared library", target.arch):
        raise TargetError(f"the compiler made {elf.read(made)} of {NAME}, not for {target.arch}: use another.")


def compile_plugin(compiler: Sequence[str], libraries: Sequence[Path], path: Path) -> None:
    """The plugin by a C++ compiler of any machine, against TVM's runtime for that machine in these folders."""
    includes = [f"-I{_package(name) / 'include'}" for name in ("tvm", "tvm_ffi")]
    runtime = [*(f"-L{folder}" for folder in libraries), "-ltvm_runtime", "-ltvm_ffi", "-ldl"]
    line = [*compiler, *FLAGS, *includes, str(SOURCES / "plugin.cc"), "-o", str(path), *runtime]
    done = process.run(line)
    if done.returncode:
        words = process.first_error(done.stderr, f"status {done.returncode}")
        raise ArtifactError(f"OpenCL support cannot be compiled with '{compiler[0]}': {words}")


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ArtifactError(f"{name} is not installed: 'pip install apache-{name.replace('_', '-')}'.")
    return Path(folders[0])
