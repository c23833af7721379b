"""No kernel leaves the compiler that the device would refuse: work-groups, local memory and registers are counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import tvm
from tvm import s_tir, tirx

from saevit_tvm.errors import CompileError
from schedules.gpu.devices import Limits
from schedules.gpu.launch import INDICES

REGISTER = 4  # bytes
FRAGMENTS = "wmma"  # the place of what a warp multiplies on tensor cores
NUMBERS = 32  # of fragments, for which every work-item of the warp takes a register


def check_launches(mod: tvm.IRModule, limits: Limits, device: str) -> None:
    """Raise CompileError for a kernel beyond the limits of the device.

    It changes nothing, and is no pass to TVM: errors of these reach the user as something else.
    """
    for name, func in mod.functions_items():
        for launch in launches(func) if isinstance(func, tirx.PrimFunc) else ():
            excess = limits.excess(*usage(launch))
            if excess:
                raise CompileError(
                    f"the kernel '{name.name_hint}' cannot run on {device}: it wants {excess}; "
                    "build with --no-tuned, or for a device with more."
                )


def launches(func: tirx.PrimFunc) -> Iterator[tirx.Stmt]:
    """The kernels of a scheduled function, as statements whose buffers are as large as they will be."""
    if isinstance(func.body, s_tir.SBlockRealize):
        # A rule schedules blocks, which allocate whole buffers until they are lowered.
        lowered = tvm.transform.Sequential(
            [
                s_tir.transform.LowerCrossThreadReduction(),
                s_tir.transform.LowerInitBlock(),
                s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
                s_tir.transform.ConvertBlocksToOpaque(),
                s_tir.transform.UnifyThreadBinding(),
                s_tir.transform.CompactBufferAllocation(),
                s_tir.transform.LowerOpaqueBlock(),
                # Work-items that sum up together do so in local memory, which appears only here.
                tirx.transform.BindTarget(tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm"}})),
                tirx.transform.FlattenBuffer(),
                s_tir.transform.LowerThreadAllreduce(),
            ]
        )(tvm.IRModule({"main": func}))
        func = lowered["main"]
    yield from func.body.seq if isinstance(func.body, tirx.SeqStmt) else [func.body]


def usage(launch: tirx.Stmt) -> tuple[int, int, int]:
    """Work-items of a work-group, bytes of local memory, registers of a work-item: if all it has is alive at once."""
    threads: dict[str, int] = {}
    memory = Counter[str]()
    for node in _statements(launch):
        if isinstance(node, tirx.For) and node.thread_binding is not None:
            threads[str(node.thread_binding.thread_tag)] = int(node.extent)
        elif isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            threads[str(node.node.thread_tag)] = int(node.value)
        elif isinstance(node, tirx.AllocBuffer):
            size = math.prod(int(extent) for extent in node.buffer.shape)
            place = str(node.buffer.scope()).partition(".")[0]
            memory[place] += size if place == FRAGMENTS else size * _bytes(str(node.buffer.dtype))
    group = math.prod(extent for tag, extent in threads.items() if tag.startswith("threadIdx"))
    registers = -(-memory["local"] // REGISTER) + memory[FRAGMENTS] // NUMBERS
    return group, memory["shared"], INDICES + registers


def _statements(node: tirx.Stmt) -> Iterator[tirx.Stmt]:
    """A statement and all that are in it."""
    yield node
    inner = [getattr(node, name, None) for name in ("body", "then_case", "else_case")]
    for each in (*getattr(node, "seq", ()), *filter(None, inner)):
        yield from _statements(each)


def _bytes(dtype: str) -> int:
    return -(-int(tvm.DataType(dtype).bits) // 8)
