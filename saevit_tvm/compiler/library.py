"""From an executable to a shared library, by the target's own linker."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from saevit_tvm.errors import CompileError, TargetError

if TYPE_CHECKING:
    from tvm.relax import VMExecutable

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


@contextlib.contextmanager
def generating_code() -> Iterator[None]:
    """The setting in which kernels become machine code, for a library and for a measurement alike."""
    import tvm

    with tvm.transform.PassContext(opt_level=3, disabled_pass=NEEDLESS):
        yield


def require_linker(target: Target) -> None:
    """Say which compiler is missing, before minutes of work rather than after."""
    if shutil.which(target.compiler) is None:
        raise TargetError(
            f"target '{target.name}' links with the C compiler '{target.compiler}', which is not there: "
            "install it (Debian: apt install gcc)."
        )


def link(executable: VMExecutable, target: Target, path: Path) -> None:
    """Write the library, with the weights inside."""
    require_linker(target)
    try:
        executable.export_library(str(path), cc=target.compiler)
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CompileError(f"linking {path.name} with '{target.compiler}' failed: {lines[-1]}") from error
