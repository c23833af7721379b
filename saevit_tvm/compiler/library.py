"""From an executable to a shared library, by the target's own linker."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm.compiler import sources
from saevit_tvm.errors import CompileError
from saevit_tvm.runtime import elf as binary
from saevit_tvm.targets import toolchain

if TYPE_CHECKING:
    import tvm
    from tvm.relax import VMExecutable

    from saevit_tvm.compiler.device_code import DeviceCode
    from saevit_tvm.targets import Target


# Passes of TVM that are most of a build and change nothing here: LLVM does the first two itself, and the others are
# for virtual threads and double buffers, which no CPU kernel has.
NEEDLESS = [
    "tirx.CommonSubexprElim",
    "s_tir.HoistIfThenElse",
    "s_tir.RenormalizeSplitPattern",
    "s_tir.InjectVirtualThread",
    "s_tir.InjectDoubleBuffer",
]
# The slowest that is left: it shrinks what blocks allocate, and generated kernels are loops without blocks.
NEEDLESS_WITHOUT_BLOCKS = ["s_tir.CompactBufferAllocation"]


@contextlib.contextmanager
def generating_code(mod: tvm.IRModule | None = None) -> Iterator[None]:
    """The setting in which kernels (of this module) become machine code, for a library and for a measurement alike."""
    from tvm import s_tir, tirx, transform

    kernels = [func for func in mod.functions.values() if isinstance(func, tirx.PrimFunc)] if mod else []
    loops = kernels and not any(isinstance(kernel.body, s_tir.SBlockRealize) for kernel in kernels)
    needless = NEEDLESS + NEEDLESS_WITHOUT_BLOCKS if loops else NEEDLESS
    with transform.PassContext(opt_level=3, disabled_pass=needless):
        yield


@contextlib.contextmanager
def told_plainly(what: str) -> Iterator[None]:
    """What TVM says when it cannot make something, in one line."""
    try:
        yield
    except RuntimeError as error:
        raise CompileError(f"TVM cannot make {what}: {_last_line(str(error))}") from error


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason was given")


def link(executable: VMExecutable, target: Target, path: Path, code: DeviceCode | None = None) -> None:
    """Write the library, with the weights inside, and see that it is one for the target."""
    if target.output == "objects":
        executable.export_library(str(path), fcompile=functools.partial(_pack, arch=target.arch))
        if target.kind != "llvm":
            sources.add(executable, target.kind, path)
        return
    chosen = toolchain.linker(target)

    def shared(output: str, objects: list[str], **_options: Any) -> None:
        done = subprocess.run(
            chosen.shared(objects, output), capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            path.unlink(missing_ok=True)
            raise CompileError(f"linking {path.name} with '{chosen.cc_argv[0]}' failed: {_last_line(done.stderr)}")

    if code is None:
        executable.export_library(str(path), fcompile=shared)
    else:
        from saevit_tvm.compiler.device_code import check_library, packer

        executable.export_library(str(path), fcompile=shared, fpack_imports=packer(code))
        check_library(path, code)
    check(path, target.arch, "shared library")


def _pack(output: str, objects: list[str], *, arch: str, **_options: Any) -> None:
    """Object files in a tar that says nothing of when and by whom it was made."""
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in map(Path, objects):
            check(path, arch, "object file")
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(member, file)


def check(path: Path, arch: str, kind: str) -> None:
    """Compilers have been seen to succeed with code for another machine: read what the file says that it is."""
    found = binary.read(path)
    if (found.machine, found.kind) != (arch, kind):
        raise CompileError(
            f"the compiler made {found} of {path.name}, where a {kind} for {arch} was asked for: "
            "see with 'saevit-tvm doctor' that the compiler is the right one."
        )
