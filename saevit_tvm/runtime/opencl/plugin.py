"""Compiles the plugin once for this machine, and puts it into TVM's runtime.

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
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from saevit_tvm.errors import ArtifactError
from saevit_tvm.runtime import abi
from saevit_tvm.runtime.opencl.driver import available

OPENCL = 4  # TVM's number for this kind of device
SOURCES = Path(__file__).with_name("plugin")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter")


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


def cache_folder() -> Path:
    """Where compiled things are kept that can be made again; the C++ side looks in the same place."""
    return Path(os.environ.get("SAEVIT_TVM_CACHE") or Path.home() / ".cache" / "saevit-tvm")


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
    tvm, tvm_ffi = _package("tvm"), _package("tvm_ffi")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    includes = [f"-I{tvm / 'include'}", f"-I{tvm_ffi / 'include'}"]
    libraries = [f"-L{tvm / 'lib'}", f"-L{tvm_ffi / 'lib'}", "-ltvm_runtime", "-ltvm_ffi", "-ldl"]
    command = [compiler, *FLAGS, *includes, str(SOURCES / "plugin.cc"), "-o", str(temporary), *libraries]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
            raise ArtifactError(f"OpenCL support cannot be compiled with '{compiler}': {lines[0]}")
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"OpenCL support cannot be put into '{path.parent}' ({error.strerror}): "
            "make room there, or set SAEVIT_TVM_CACHE to another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ArtifactError(f"{name} is not installed: 'pip install apache-{name.replace('_', '-')}'.")
    return Path(folders[0])
