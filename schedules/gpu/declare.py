"""GPU kernels between the graph and their loops: declared, tiled by a record or by default, expanded."""

from __future__ import annotations

import dataclasses
import json

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from schedules.gpu.families import KERNELS, PREFIX
from schedules.gpu.launch import Kernel, Limits
from schedules.regions import BLOCK, NAME, SHAPE, TILING, chosen_tiling, declared


def declare(kernel: Kernel) -> tirx.PrimFunc:
    """A kernel with a name and a shape, but no loops."""
    return kernel.declared({NAME: PREFIX + kernel.NAME, SHAPE: json.dumps(kernel.shape, sort_keys=True)}, BLOCK)


def kernel_of(func: tirx.PrimFunc) -> Kernel | None:
    """The kernel that a declaration declares, or None for any other function."""
    found = declared(func)
    if found is None or found.region not in KERNELS:
        return None
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in found.shape.items()}
    return KERNELS[found.region](**fields)


def tilings(mod: tvm.IRModule, limits: Limits) -> list[Schedule]:
    """The search space of a declared kernel: one schedule for each tiling that the device can run."""
    kernel = kernel_of(mod["main"])
    assert kernel is not None
    return [_tiled(mod, dataclasses.asdict(tiling)) for tiling in kernel.tilings(limits)]


def _tiled(mod: tvm.IRModule, tiling: dict[str, int]) -> Schedule:
    schedule = Schedule(mod)
    schedule.annotate(schedule.get_sblock(BLOCK), TILING, json.dumps(tiling, sort_keys=True))
    return schedule


def expand(func: tirx.PrimFunc, limits: Limits) -> tirx.PrimFunc:
    """The loops of a declared kernel, with the tiling that was noted on it or the default."""
    kernel = kernel_of(func)
    assert kernel is not None
    return kernel.generated(limits, chosen_tiling(func))


def expanded(mod: tvm.IRModule, limits: Limits) -> tvm.IRModule:
    """The loops of one declared and tiled kernel by itself, to be measured."""
    return tvm.IRModule({"main": expand(mod["main"], limits).with_attr("global_symbol", "main")})
