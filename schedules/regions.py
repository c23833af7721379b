"""Regions as kernels: first declared, then tiled, then generated.

A region starts as a *declaration*: a PrimFunc with the region's name, its shape and its weights in natural layout,
but no loops. Tuning and records note its tiling on it with an ordinary schedule instruction, so a
record of such a kernel is a MetaSchedule record like any other. Last, the generator of the region turns the
declaration into loops for the target's vectors and packs the weights as these loops want them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import from_source
from tvm.script import tirx as script

from schedules.cpu import ciffn, conv, dwsconv, head, saa
from schedules.cpu.isa import Isa
from schedules.cpu.lowered import Lowered
from schedules.gpu.families import KERNELS
from schedules.saa_shape import SAAShape

BLOCK = "region"
NAME = "saevit.region"
SHAPE = "saevit.shape"
TILING = "saevit.tiling"
OPAQUE = 8  # TVM's code for an operator that nothing may be fused into
DTYPE = "dtype"  # in a shape: what activations and weights are stored in, where that is not float32
WIDE = ("head",)  # computed in float32 whatever is stored: the mean of all positions, and a product that loads bind
DIVISION = ("bands", "groups", "chunk")  # the knobs, of any generator, that depend on the number of threads

Shape = dict[str, Any]


class Declared(NamedTuple):
    """A declaration read back."""

    region: str
    shape: Shape
    weights: list[str]


# The generator of each region, and the class of its shape.
GENERATORS: dict[str, tuple[Any, type]] = {
    "saa": (saa, SAAShape),
    "ciffn": (ciffn, ciffn.CIFFNShape),
    "dwsconv": (dwsconv, dwsconv.DWSConvShape),
    "conv": (conv, conv.ConvShape),
    "head": (head, head.HeadShape),
}


def supported(region: str, shape: Shape, isa: Isa) -> bool:
    """Whether the region has a generator that can do this shape; no loop is generated to find out."""
    module, ready, _ = _generator(region, shape, isa)
    return module.accepts(ready)


def lower(
    region: str,
    shape: Shape,
    weights: Mapping[str, np.ndarray],
    isa: Isa,
    tiling: Mapping[str, int] | None = None,
    threads: int = 1,
) -> Lowered | None:
    """The loops of a region and its packed weights, or None where its generator declines."""
    module, ready, unit = _generator(region, shape, isa)
    chosen = module.Tiling(**tiling) if tiling else None
    return module.lower(ready, dict(weights), unit, chosen, threads)


def _generator(region: str, shape: Shape, isa: Isa) -> tuple[Any, Any, Isa]:
    """Who generates a region, its shape for them, and the vectors to use."""
    module, shape_class = GENERATORS[region]
    unit = isa.storing(shape.get(DTYPE, "float32"))
    ready = shape_class(**{name: value for name, value in shape.items() if name != DTYPE})
    return module, ready, unit.wide() if region in WIDE else unit


def declare(
    region: str,
    shape: Shape,
    data: tuple[int, ...],
    weights: Mapping[str, np.ndarray],
    result: tuple[int, ...],
) -> tirx.PrimFunc:
    """The declaration of a region, from the extents of its input, weights and output.

    Weights are in float32, so that packing rounds them only once; a picture is as it comes from outside.
    """
    names = ["x", *weights, "out"]
    buffers = [data, *(weight.shape for weight in weights.values()), result]
    stored = shape.get(DTYPE, "float32")
    dtypes = ["float32" if shape.get("channels_first") else stored, *["float32"] * len(weights), stored]
    params = ", ".join(
        f'{name}: T.Buffer({extents}, "{dtype}")' for name, extents, dtype in zip(names, buffers, dtypes, strict=True)
    )
    whole = [
        f"{name}[{', '.join(f'0:{extent}' for extent in extents)}]"
        for name, extents in zip(names, buffers, strict=True)
    ]
    attrs = {
        "tirx.noalias": True,
        "op_pattern": OPAQUE,
        NAME: region,
        SHAPE: json.dumps(shape, sort_keys=True),
    }
    text = f"""
@T.prim_func(private=True, s_tir=True)
def {region}({params}):
    T.func_attr({attrs!r})
    with T.sblock("root"):
        T.reads()
        T.writes()
        with T.sblock("{BLOCK}"):
            T.reads({", ".join(whole[:-1])})
            T.writes({whole[-1]})
            T.evaluate(0)
"""
    return from_source(text, extra_vars={"T": script})


def declared(func: tirx.PrimFunc) -> Declared | None:
    """What a declaration declares, or None for any other function."""
    if NAME not in func.attrs:
        return None
    weights = [str(weight.name) for weight in func.params[1:-1]]
    return Declared(str(func.attrs[NAME]), json.loads(str(func.attrs[SHAPE])), weights)


def tilings(mod: tvm.IRModule, isa: Isa) -> list[Schedule]:
    """The search space of a declared kernel: one schedule for each tiling that its generator offers."""
    found = declared(mod["main"])
    assert found is not None
    module, shape, unit = _generator(found.region, found.shape, isa)
    offered = module.tilings(shape, unit)
    return [_tiled(mod, dataclasses.asdict(tiling)) for tiling in offered]


def _tiled(mod: tvm.IRModule, tiling: Mapping[str, int]) -> Schedule:
    # Numbers, not a place in the list: a record stays right when the list changes.
    schedule = Schedule(mod)
    schedule.annotate(schedule.get_sblock(BLOCK), TILING, json.dumps(tiling, sort_keys=True))
    return schedule


def cut_for(mod: tvm.IRModule, tiling: Mapping[str, int], isa: Isa, threads: int) -> Schedule:
    """A declared kernel with the register tiles of a tiling, but its work divided among `threads`."""
    found = declared(mod["main"])
    assert found is not None
    module, shape, unit = _generator(found.region, found.shape, isa)
    default = dataclasses.asdict(module.default_tiling(shape, unit, threads))
    return _tiled(mod, {name: default[name] if name in DIVISION else value for name, value in tiling.items()})


def outdated(func: tirx.PrimFunc) -> bool:
    """Whether a schedule noted a tiling that the generator does not understand any more."""
    noted = declared(func) is not None and TILING in func.body.block.body.block.annotations
    return noted and chosen_tiling(func) is None


def chosen_tiling(func: tirx.PrimFunc) -> dict[str, int] | None:
    """The tiling that a schedule noted on a declaration, or None when none did or the generator has other knobs now."""
    annotations = func.body.block.body.block.annotations
    found = declared(func)
    if found is None or TILING not in annotations:
        return None
    tiling = json.loads(str(annotations[TILING]))
    knobs = {field.name for field in dataclasses.fields(_tiling_class(found.region))}
    return tiling if tiling.keys() == knobs else None


def _tiling_class(region: str) -> Any:
    return KERNELS[region].KNOBS if region in KERNELS else GENERATORS[region][0].Tiling


def expanded(mod: tvm.IRModule, isa: Isa, threads: int) -> tvm.IRModule:
    """The loops of one declared and tiled kernel by itself, to be measured."""
    func = mod["main"]
    found = declared(func)
    assert found is not None
    lowered = lower(found.region, found.shape, _example_weights(func), isa, chosen_tiling(func), threads)
    assert lowered is not None, f"the generator of {found.region} declines what it offered"
    return tvm.IRModule({"main": lowered.func.with_attr("global_symbol", "main")})


def _example_weights(func: tirx.PrimFunc) -> dict[str, np.ndarray]:
    """Weights of the declared shapes, to generate the loops before there is a model."""
    random = np.random.RandomState(0)
    shapes = {str(weight.name): [int(extent) for extent in weight.shape] for weight in func.params[1:-1]}
    return {name: random.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
