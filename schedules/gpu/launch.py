"""What a GPU kernel is here: a body in TVMScript between its work-groups and work-items, over flat buffers.

A region becomes a list of launches. Images stay channels first, so that neighbouring work-items, which are
neighbouring positions, read neighbouring numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from textwrap import indent

import numpy as np
from tvm import tirx
from tvm.script import from_source
from tvm.script import tirx as script

OPAQUE = 8  # TVM's code for an operator that nothing may be fused into
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Limits:
    """What a kernel may take for granted of a device, and how many work-items it runs in lockstep."""

    work_group: int
    local_bytes: int
    wave: int = 64


@dataclass(frozen=True)
class Launch:
    """One kernel: the names of what it reads, and the name and shape of what it writes."""

    name: str
    func: tirx.PrimFunc
    reads: tuple[str, ...]
    writes: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Lowered:
    """The launches of a region, in order; the first reads "x", the last writes "out". Constants by name."""

    launches: list[Launch]
    constants: dict[str, np.ndarray]


def kernel(
    name: str,
    reads: Mapping[str, Sequence[int]],
    writes: str,
    shape: Sequence[int],
    *,
    grid: Sequence[int],
    group: Sequence[int],
    body: str,
    private: Mapping[str, int] | None = None,
    shared: Mapping[str, int] | None = None,
) -> Launch:
    """A launch of `grid` work-groups (bx, by, bz) of `group` work-items (tx, ty) each.

    In the body every buffer is flat; `private` ones belong to a work-item, `shared` ones to a work-group.
    """
    buffers = {**reads, writes: shape}
    params = ", ".join(f'{each}_: T.Buffer({tuple(extents)}, "float32")' for each, extents in buffers.items())
    lines = [
        f'{each} = T.decl_buffer(({_size(extents)},), "float32", data={each}_.data)'
        for each, extents in buffers.items()
    ]
    depth = 0
    threads = [(f"b{axis}", extent, f"blockIdx.{axis}") for axis, extent in zip("xyz", grid, strict=False)]
    threads += [(f"t{axis}", extent, f"threadIdx.{axis}") for axis, extent in zip("xyz", group, strict=False)]
    for var, extent, thread in threads:
        lines.append("    " * depth + f'for {var} in T.thread_binding({extent}, thread="{thread}"):')
        depth += 1
    for scope, scratch in (("local", private or {}), ("shared", shared or {})):
        lines += [
            "    " * depth + f'{each} = T.alloc_buffer(({size},), "float32", scope="{scope}")'
            for each, size in scratch.items()
        ]
    lines.append(indent(body.strip("\n"), "    " * depth))
    attrs = {"tirx.noalias": True, "op_pattern": OPAQUE}
    text = f"@T.prim_func(private=True, s_tir=True)\ndef {name}({params}):\n    T.func_attr({attrs!r})\n"
    func = _parsed(text + indent("\n".join(lines), "    "))
    return Launch(name, func, tuple(reads), writes, tuple(shape))


@cache
def _parsed(text: str) -> tirx.PrimFunc:
    """Blocks of one shape have the same text, and reading it is most of the work."""
    return from_source(text, extra_vars={"T": script})


def blocks(work: int, size: int) -> int:
    """How many pieces of a size cover the work."""
    return -(-work // size)


def gelu(value: str) -> str:
    """GELU by the device's own error function."""
    return f"{value} * (T.float32(0.5) + T.float32(0.5) * T.erf({value} * T.float32({0.5**0.5!r})))"


def _size(extents: Sequence[int]) -> int:
    return int(np.prod(tuple(extents), dtype=np.int64))
