"""The C compiler that links, and compiles C, for a platform: a cross gcc, clang with Debian's libraries, or zig."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from saevit_tvm.support.errors import TargetError

# The compilers that can make Linux programs of another architecture, the best first.
LINKERS = {
    "aarch64": ("aarch64-linux-gnu-gcc", "clang", "zig"),
    "riscv64": ("riscv64-linux-gnu-gcc", "clang", "zig"),
}

# What zig links for: old enough for every distribution that is still cared for.
_GLIBC = "2.31"

_PACKAGES = {
    "cc": "Debian: apt install gcc",
    "aarch64-linux-gnu-gcc": "Debian: apt install gcc-aarch64-linux-gnu",
    "riscv64-linux-gnu-gcc": "Debian: apt install gcc-riscv64-linux-gnu",
    "zig": "pip install ziglang",
}


class Platform(Protocol):
    """What a compiler must know of where its output will run; a target says it."""

    @property
    def name(self) -> str: ...

    @property
    def arch(self) -> str: ...

    @property
    def triple(self) -> str: ...

    @property
    def linkers(self) -> tuple[str, ...]: ...

    @property
    def link_flags(self) -> tuple[str, ...]: ...

    @property
    def android(self) -> bool: ...


@dataclass(frozen=True)
class Linux:
    """Any Linux of an architecture."""

    arch: str
    link_flags: tuple[str, ...] = ()
    android: bool = False

    @property
    def name(self) -> str:
        return f"{self.arch} Linux"

    @property
    def triple(self) -> str:
        return f"{self.arch}-linux-gnu"

    @property
    def linkers(self) -> tuple[str, ...]:
        return linkers_for(self.arch)


def linkers_for(arch: str) -> tuple[str, ...]:
    """The compilers that can make Linux programs of an architecture, the best first."""
    return ("cc",) if arch == platform.machine() else LINKERS[arch]


@dataclass(frozen=True)
class Toolchain:
    """`cc_argv` compiles C for a platform; with `link_flags` and -shared it links a library."""

    cc_argv: tuple[str, ...]
    origin: str
    link_flags: tuple[str, ...] = ()

    def shared(self, objects: list[str], output: str) -> list[str]:
        """The command that links objects to a shared library."""
        return [*self.cc_argv, "-shared", "-fPIC", *self.link_flags, "-o", output, *objects]


def linker(target: Platform) -> Toolchain:
    """The first of the target's compilers that is there, or one sentence that says what to install."""
    for name in target.linkers:
        found = _find(name, target.arch, target.triple)
        if found is not None:
            return replace(found, link_flags=target.link_flags)
    ways = [_PACKAGES[name] for name in target.linkers if name in _PACKAGES]
    raise TargetError(
        f"target '{target.name}' needs a C compiler for {target.triple}, and there is none: "
        f"install one ({' or '.join(ways)})."
    )


def programs(target: Platform) -> Toolchain:
    """What makes whole programs for a target, with its C library.

    Android's is not to be had without an NDK. With another one inside, a program needs nothing but Linux, which
    Android's shell runs like any other. A distribution's is there already; zig compiles musl's first, for a minute.
    """
    if not target.android:
        return linker(target)
    for name in linkers_for(target.arch):
        found = _find(name, target.arch, f"{target.arch}-linux-musl")
        if found is not None and (name == "zig" or _has_static_libc(target.arch)):
            return replace(found, cc_argv=(*found.cc_argv, "-static"))
    return linker(target)


def cxx(target: Platform) -> tuple[str, ...]:
    """A C++ compiler with the C++ library of TVM's runtime, which errors of one must pass through: not zig's."""
    if not target.android:
        for name in target.linkers:
            found = _find(name, target.arch, target.triple) if name != "zig" else None
            path = found and shutil.which(_cxx_name(found.cc_argv[0]))
            if found and path:
                return (path, *found.cc_argv[1:])
    package = _PACKAGES[target.linkers[0]].replace("gcc", "g++")
    way = "build for a board with Linux" if target.android else f"install one ({package})"
    raise TargetError(
        f"OpenCL support for target '{target.name}' needs a C++ compiler with libstdc++ for {target.triple}, "
        f"and there is none: {way}."
    )


def _cxx_name(cc: str) -> str:
    """gcc's is g++, cc's is c++, clang's is clang++."""
    for suffix, name in (("clang", "clang++"), ("gcc", "g++"), ("cc", "c++")):
        if cc.endswith(suffix):
            return cc.removesuffix(suffix) + name
    return cc


def sysroot(arch: str) -> Path | None:
    """Where a distribution keeps the C library of another architecture, for programs that are run under qemu."""
    folder = Path(f"/usr/{arch}-linux-gnu")
    return folder if (folder / "lib" / "libc.so.6").exists() else None


def _has_static_libc(arch: str) -> bool:
    folder = sysroot(arch)
    return folder is not None and (folder / "lib" / "libc.a").exists()


def _find(name: str, arch: str, triple: str) -> Toolchain | None:
    if name == "clang":
        return _clang(arch)
    if name == "zig":
        return _zig(triple)
    path = shutil.which(name)
    return Toolchain((path,), "gcc") if path else None


def _clang(arch: str) -> Toolchain | None:
    """Clang has every architecture in it; what it may lack are a linker and the libraries."""
    clang, linker_there = shutil.which("clang"), shutil.which(f"{arch}-linux-gnu-ld")
    if clang is None or linker_there is None or sysroot(arch) is None:
        return None
    return Toolchain((clang, f"--target={arch}-linux-gnu"), "clang")


def _zig(triple: str) -> Toolchain | None:
    """Zig brings linkers and C libraries for everything; from PyPI it is a module, elsewhere a program."""
    zig = shutil.which("zig")
    if zig is not None:
        start: tuple[str, ...] = (zig,)
    elif importlib.util.find_spec("ziglang") is not None:
        start = (sys.executable, "-m", "ziglang")
    else:
        return None
    triple += f".{_GLIBC}" if triple.endswith("-gnu") else ""
    # Left to itself, zig makes slow code with checks in it.
    return Toolchain((*start, "cc", "-target", triple, "-O2", "-fno-sanitize=undefined"), "zig")
