"""From an executable to a shared library, by the target's own linker, or to object files."""

from __future__ import annotations

import contextlib
import functools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm.runtime import elf as binary
from saevit_tvm.support import process, toolchain
from saevit_tvm.support.errors import CompileError

if TYPE_CHECKING:
    import tvm
    from tvm.relax import VMExecutable


# Passes of TVM that are most of a build and change nothing here: LLVM does the first three itself, and the others are
# for GPUs, software pipelines, virtual threads and double buffers, which no CPU kernel has.
NEEDLESS = [
    "tirx.CommonSubexprElim",
    "s_tir.HoistIfThenElse",
    "tirx.RemoveNoOp",
    "s_tir.RenormalizeSplitPattern",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.ThreadSync",
    "s_tir.InjectVirtualThread",
    "s_tir.InjectDoubleBuffer",
    "s_tir.InferFragment",
    "s_tir.LowerThreadAllreduce",
    "s_tir.LowerVtcmAlloc",
    "s_tir.MergeSharedMemoryAllocations",
    "s_tir.TransformMmaBufferLayout",
]
# The slowest that are left: one shrinks what blocks allocate and one simplifies what blocks have become, before the
# loops are unrolled and simplified once more. Generated kernels are loops without blocks.
NEEDLESS_WITHOUT_BLOCKS = ["s_tir.CompactBufferAllocation", "s_tir.StmtSimplify"]


def settings(mod: tvm.IRModule | None = None) -> dict[str, Any]:
    """What TVM is told for the kernels of a module, or for any."""
    from tvm import s_tir, tirx

    kernels = [func for func in mod.functions.values() if isinstance(func, tirx.PrimFunc)] if mod else []
    loops = kernels and not any(isinstance(kernel.body, s_tir.SBlockRealize) for kernel in kernels)
    return {"opt_level": 3, "disabled_pass": NEEDLESS + (NEEDLESS_WITHOUT_BLOCKS if loops else [])}


@contextlib.contextmanager
def generating_code(mod: tvm.IRModule | None = None) -> Iterator[None]:
    """The setting in which kernels (of this module) become machine code, for a library and for a measurement alike."""
    from tvm import transform

    with transform.PassContext(**settings(mod)):
        yield


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """What TVM says when it cannot make something, in one line."""
    try:
        yield
    except RuntimeError as error:
        raise CompileError(f"TVM cannot make {what}: {process.last_line(str(error))}") from error


def link_shared(
    executable: VMExecutable, target: toolchain.Platform, path: Path, pack: Callable[..., str] | None = None
) -> None:
    """Write the library, with the weights inside, and see that it is one for the target.

    `pack` writes the modules behind the library's own code, where TVM's own way will not do.
    """
    chosen = toolchain.linker(target)

    def shared(output: str, objects: list[str], **_options: Any) -> None:
        done = process.run(chosen.shared(objects, output))
        if done.returncode:
            path.unlink(missing_ok=True)
            words = process.last_line(done.stderr)
            raise CompileError(f"linking {path.name} with '{chosen.cc_argv[0]}' failed: {words}")

    packing = {"fpack_imports": pack} if pack else {}
    executable.export_library(str(path), fcompile=shared, **packing)
    check(path, target.arch, "shared library")


def pack_objects(executable: VMExecutable, target: toolchain.Platform, path: Path) -> None:
    """Write object files, to be linked elsewhere."""
    executable.export_library(str(path), fcompile=functools.partial(_pack, arch=target.arch))


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
