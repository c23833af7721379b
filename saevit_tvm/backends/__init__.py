"""Backends: all that differs between kinds of target. Adding one is a file here and a line in the table below.

A target names its kind by TVM's word for it; who needs to know what that means asks the backend.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from saevit_tvm.backends.base import Backend
    from saevit_tvm.compiler.street import Compiled, Records, TunableKernel
    from saevit_tvm.models.opening import ModelSource
    from saevit_tvm.targets import Target


@cache
def get(kind: str) -> Backend:
    """The backend for a kind of target."""
    from saevit_tvm.backends import cpu, cuda, opencl, source

    table: dict[str, type[Backend]] = {
        "llvm": cpu.Cpu,
        "opencl": opencl.OpenCL,
        "cuda": cuda.Cuda,
        "metal": source.Source,
        "webgpu": source.Source,
    }
    return table[kind]()


def described(manifest: dict[str, Any]) -> Backend:
    """The backend of the target that an artifact was built for."""
    return get(manifest["target"]["tvm"]["kind"])


def compile_model(
    source: ModelSource,
    target: Target,
    *,
    records: Records | None = None,
    dump_ir: Path | None = None,
    dtype: str = "float32",
    smaller: Sequence[ModelSource] = (),
) -> Compiled:
    """The whole street: from a model, and itself at smaller batches, to an executable for the target."""
    from saevit_tvm.compiler import street

    recipe = street.Recipe(source, target.computing_in(dtype), dtype, records)
    return street.compile_model(get(target.kind), recipe, dump_ir, smaller)


def kernels_to_tune(source: ModelSource, target: Target, dtype: str = "float32") -> list[TunableKernel]:
    """Every distinct kernel that the model needs on the target and that can be tuned, most used first."""
    from saevit_tvm.compiler import street

    return street.kernels_to_tune(get(target.kind), street.Recipe(source, target.computing_in(dtype), dtype))


# Where code for a target can run ----------------------------------------------


def require(target: Target) -> None:
    """Raise TargetError unless what the target's output is made with is there."""
    from saevit_tvm.support import toolchain
    from saevit_tvm.support.errors import TargetError

    if target.output == "library":
        toolchain.linker(target)
    if lacking := get(target.kind).lacking():
        raise TargetError(f"target '{target.name}' cannot be built: {lacking}.")


def runs_here(target: Target) -> tuple[bool, str]:
    """Whether this machine can run the target's code, and if not, why not."""
    return get(target.kind).runs_here(target)


def how_to_run(target: Target) -> str | None:
    """Where code for the target can be run from here: "host", "qemu", or nowhere."""
    return _where(target)[0]


def why_not(target: Target) -> str:
    """Why code for the target cannot be run from here."""
    return _where(target)[1]


def _where(target: Target) -> tuple[str | None, str]:
    if target.output == "objects":
        what = "sources and object files" if get(target.kind).is_gpu else "object files"
        return None, f"gives {what}, to be linked and proven on such a machine"
    runs, reason = runs_here(target)
    if runs:
        return "host", ""
    if target.emulator is None or target.arch == platform.machine():
        return None, reason
    from saevit_tvm.emulators import qemu

    lacking = qemu.missing(target.arch)
    return (None, f"{reason}; {lacking}") if lacking else ("qemu", "")
