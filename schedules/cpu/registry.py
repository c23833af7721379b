"""Which generator makes a kernel on a CPU: fused blocks before primitives, and the first that accepts wins.

A generator is found by itself, by its file in `fused/` or `primitives/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from schedules.cpu import fused, primitives
from schedules.cpu.generator import Arrays, Generator
from schedules.discovery import classes
from schedules.kernels import completed, declared, noted, tiled
from schedules.machines.cpus import Isa
from schedules.spec import KernelSpec

GENERATORS: tuple[Generator, ...] = tuple(
    each() for package in (fused, primitives) for each in classes(package, Generator)
)
DIVISION = ("bands", "groups", "chunk")  # the knobs, of any generator, that depend on the number of threads


def generator(spec: KernelSpec, isa: Isa) -> Generator | None:
    """The one that makes the kernel, or None where there is none."""
    return next((each for each in GENERATORS if each.accepts(spec, isa)), None)


def takes(spec: KernelSpec, isa: Isa, threads: int) -> bool:
    """Whether a kernel is to be declared: there is a generator, and it pays."""
    made_by = generator(spec, isa)
    return made_by is not None and made_by.pays(made_by.problem(spec), threads)


def tilings(mod: tvm.IRModule, isa: Isa) -> list[Schedule]:
    """The search space of a declared kernel: one schedule for each tiling that its generator offers."""
    spec, made_by = _of(mod["main"], isa)
    return [tiled(mod, tiling) for tiling in made_by.tilings(spec, isa)]


def cut_for(mod: tvm.IRModule, tiling: Mapping[str, int], isa: Isa, threads: int) -> Schedule:
    """A declared kernel with the register tiles of a tiling, but its work divided among `threads`."""
    spec, made_by = _of(mod["main"], isa)
    default = dataclasses.asdict(made_by.default(spec, isa, threads))
    return tiled(mod, {name: default[name] if name in DIVISION else value for name, value in tiling.items()})


def chosen_tiling(func: tirx.PrimFunc, isa: Isa) -> dict[str, int] | None:
    """The tiling that was noted on a declaration; None where none was, or the generator has other knobs now."""
    tiling = noted(func)
    return None if tiling is None else completed(tiling, _of(func, isa)[1].TILING)


def lower(func: tirx.PrimFunc, weights: Arrays, isa: Isa, threads: int) -> tuple[tirx.PrimFunc, list[np.ndarray]]:
    """The loops of a declared kernel, and its packed weights."""
    spec, made_by = _of(func, isa)
    tiling = chosen_tiling(func, isa)
    return made_by.lower(spec, weights, isa, made_by.TILING(**tiling) if tiling else None, threads)


def expanded(mod: tvm.IRModule, isa: Isa, threads: int) -> tvm.IRModule:
    """The loops of one declared and tiled kernel by itself, to be measured; they are the same for all weights."""
    spec, _ = _of(mod["main"], isa)
    random = np.random.RandomState(0)
    weights = {each.name: random.standard_normal(each.shape).astype("float32") for each in spec.weights}
    func, _ = lower(mod["main"], weights, isa, threads)
    return tvm.IRModule({"main": func.with_attr("global_symbol", "main")})


def _of(func: tirx.PrimFunc, isa: Isa) -> tuple[KernelSpec, Generator]:
    spec = declared(func)
    assert spec is not None
    found = generator(spec, isa)
    assert found is not None, f"no generator makes {spec.text}"
    return spec, found
