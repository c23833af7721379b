"""Every kind of GPU kernel, and its way from a declaration to loops: tiled by a record or by default, then expanded."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from schedules import kernels
from schedules.discovery import classes
from schedules.gpu import fused, primitives
from schedules.gpu.launch import PREFIX, Kernel, Limits

# By what their specs say is computed; found by their files.
KERNELS: dict[str, type[Kernel]] = {
    PREFIX + kernel.NAME: kernel for package in (fused, primitives) for kernel in classes(package, Kernel)
}


def declare(kernel: Kernel) -> tirx.PrimFunc:
    """A kernel with its spec, but no loops."""
    return kernels.declare(kernel.spec)


def kernel_of(func: tirx.PrimFunc) -> Kernel | None:
    """The kernel that a declaration declares, or None for any other function."""
    spec = kernels.declared(func)
    return KERNELS[spec.op].of(spec) if spec is not None and spec.op in KERNELS else None


def tilings(mod: tvm.IRModule, limits: Limits) -> list[Schedule]:
    """The search space of a declared kernel: one schedule for each tiling that the device can run."""
    return [kernels.tiled(mod, tiling) for tiling in _of(mod["main"]).tilings(limits)]


def chosen_tiling(func: tirx.PrimFunc) -> dict[str, int] | None:
    """The tiling that was noted on a declaration; None where none was, or the kernel has other knobs now."""
    kernel, tiling = kernel_of(func), kernels.noted(func)
    return None if kernel is None or tiling is None else kernels.completed(tiling, kernel.KNOBS)


def expand(func: tirx.PrimFunc, limits: Limits) -> tirx.PrimFunc:
    """The loops of a declared kernel, with the tiling that was noted on it or the default."""
    return _of(func).generated(limits, chosen_tiling(func))


def expanded(mod: tvm.IRModule, limits: Limits) -> tvm.IRModule:
    """The loops of one declared and tiled kernel by itself, to be measured."""
    return tvm.IRModule({"main": expand(mod["main"], limits).with_attr("global_symbol", "main")})


def _of(func: tirx.PrimFunc) -> Kernel:
    kernel = kernel_of(func)
    assert kernel is not None
    return kernel
