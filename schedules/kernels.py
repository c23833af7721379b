"""Kernels between the graph and their loops: declared, then tiled.

A kernel starts as a *declaration*: a PrimFunc with its spec and its weights in natural layout, but no loops. Tuning
and records note a tiling on it with an ordinary schedule instruction, so a record of such a kernel is a MetaSchedule
record like any other. Last, a generator turns the declaration into loops.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as script

from schedules.spec import KernelSpec, Tensor

BLOCK = "region"
SPEC = "saevit.spec"
TILING = "saevit.tiling"
OPAQUE = 8  # TVM's code for an operator that nothing may be fused into


def declare(spec: KernelSpec) -> tirx.PrimFunc:
    """func(*inputs, *weights, *outputs) without loops: one block that reads and writes everything."""
    read, written = (*spec.inputs, *spec.weights), spec.outputs
    # Built, not parsed: TVM takes 30 ms to parse such a text, and a model has hundreds of calls.
    with IRBuilder() as builder, script.prim_func(is_private=True, s_tir=True):
        script.func_name(spec.op)
        script.func_attr({"tirx.noalias": True, "op_pattern": OPAQUE, SPEC: spec.text})
        params = {each.name: script.arg(each.name, script.buffer(each.shape, each.dtype)) for each in (*read, *written)}

        def whole(tensors: tuple[Tensor, ...]) -> list[tirx.BufferRegion]:
            return [params[each.name][tuple(slice(0, extent) for extent in each.shape)] for each in tensors]

        with script.sblock("root"):
            script.reads([])
            script.writes([])
            with script.sblock(BLOCK):
                script.reads(*whole(read))
                script.writes(*whole(written))
                script.evaluate(0)
    return builder.get()


def declared(func: tirx.PrimFunc) -> KernelSpec | None:
    """The spec that a declaration carries, or None for any other function."""
    return KernelSpec.parse(str(func.attrs[SPEC])) if SPEC in func.attrs else None


def key(mod: tvm.IRModule) -> str | None:
    """What records know a declared kernel by: the text of its spec. Tiled, a digest of that and the tiling."""
    (func,) = mod.functions.values()
    if not isinstance(func, tirx.PrimFunc) or SPEC not in func.attrs:
        return None
    tiling = noted(func)
    return str(func.attrs[SPEC]) if tiling is None else candidate_key(str(func.attrs[SPEC]), tiling)


def candidate_key(spec: str, tiling: Mapping[str, int]) -> str:
    text = f"{spec}\n{json.dumps(tiling, sort_keys=True)}"
    return "0x" + hashlib.sha256(text.encode()).hexdigest()[:16]


def tiled(mod: tvm.IRModule, tiling: Any) -> Schedule:
    """A schedule that notes a tiling on a declaration."""
    # Numbers, not a place in the list: a record stays right when the list changes.
    knobs = tiling if isinstance(tiling, Mapping) else dataclasses.asdict(tiling)
    schedule = Schedule(mod)
    schedule.annotate(schedule.get_sblock(BLOCK), TILING, json.dumps(knobs, sort_keys=True))
    return schedule


def noted(func: tirx.PrimFunc) -> dict[str, int] | None:
    """The tiling that a schedule noted on a declaration, if one did."""
    if declared(func) is None:
        return None
    annotations = func.body.block.body.block.annotations
    return json.loads(str(annotations[TILING])) if TILING in annotations else None


def completed(tiling: Mapping[str, int], kind: Any) -> dict[str, int] | None:
    """A tiling as a generator's kind has it now: a knob that was added later has its default. None if others differ."""
    knobs = {field.name: field.default for field in dataclasses.fields(kind)}
    whole = {name: value for name, value in knobs.items() if value is not dataclasses.MISSING} | dict(tiling)
    return whole if whole.keys() == knobs.keys() else None
