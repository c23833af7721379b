"""What a GPU kernel is here: a body in TVMScript between its work-groups and work-items, over flat buffers.

A spec of the graph becomes a list of launches. A launch starts as a *declaration*, without loops, on which tuning and
records note a tiling; last, its kernel writes the loops. Images stay channels first, so that neighbouring work-items,
which are neighbouring positions, read neighbouring numbers.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from textwrap import indent
from typing import Any, ClassVar

import numpy as np
from tvm import s_tir, tirx

from schedules.dtypes import DTYPES
from schedules.gpu.reading import read
from schedules.kernels import OPAQUE
from schedules.machines.gpus import Limits
from schedules.spec import Epilogue, KernelSpec, Tensor

PREFIX = "gpu_"  # of what the spec of a kernel says is computed: the same names mean other kernels on a CPU
EPILOGUE = "epilogue"  # the field of kernels that have one
Weights = Mapping[str, np.ndarray]  # constants by name

TEXEL = 4  # numbers that one read of an image gives
BARRIER = 'T.evaluate(T.tvm_storage_sync("shared"))'  # for a work-group, and what it wrote into local memory
INDICES = 16  # registers that a work-item needs for positions, addresses and what is under way

# A kernel that TVM's runtime launches with this begins while the one before it ends: its blocks are in place before
# they may read anything. So each waits, first of all, until everything before it is done and in memory, which means
# that it has waited, too; then the next may come.
OVERLAPPING = "tirx.use_programtic_dependent_launch"
_IN_TURN = """\
static __device__ __forceinline__ void in_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\\n\\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}
"""
IN_TURN = f"T.evaluate(T.cuda.func_call('in_turn', source_code={_IN_TURN!r}))"


@dataclass(frozen=True)
class Buffer:
    """Numbers in main memory."""

    extents: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        return int(np.prod(self.extents, dtype=np.int64))


@dataclass(frozen=True)
class Memory:
    """How a kernel reads and writes its buffers. Short numbers are float32 as soon as they are read.

    For float16, the functions that do this for one number or four are in every OpenCL, whether or not it computes in
    float16. `native` where it does: then float16 is a type like any other. (bfloat16 there is on NVIDIA's alone.)
    """

    buffers: Mapping[str, Buffer]
    native: bool

    def load(self, name: str, index: str, dtype: str = "float32") -> str:
        """One number, as an expression of a dtype."""
        stored = self.buffers[name].dtype
        if stored == "float16" and not self.native:
            return f'T.call_pure_extern("float32", "vload_half", 0, T.address_of({name}[{index}]))'
        return f"{name}[{index}]" if stored == dtype else f'T.Cast("{dtype}", {name}[{index}])'

    def load_lanes(self, into: str, at: str, name: str, index: str, lanes: int, dtype: str = "float32") -> str:
        """Neighbouring numbers into private memory of a dtype, as a statement."""
        if lanes == 1:
            return f"{into}[{at}] = {self.load(name, index, dtype)}"
        if self.buffers[name].dtype == "float16" and not self.native:
            loaded = f'T.call_pure_extern("float32x{lanes}", "vload_half{lanes}", 0, T.address_of({name}[{index}]))'
            return f"{into}[T.Ramp({at}, 1, {lanes})] = {loaded}"
        number = self.load(name, f"{index} + v", dtype)
        return nest(f"for v in T.vectorized({lanes}):", f"{into}[{at} + v] = {number}")

    def load_texels(self, into: str, name: str, index: str, lanes: int, dtype: str = "float32") -> str:
        """Neighbouring numbers through an image over the buffer, as statements; the index is in texels.

        The kernel's parameter is then the image, and nothing else may read it. An image of float16 gives float32 to
        whom asks for that, also where there is no arithmetic in float16.
        """
        read = {"float32": "read_imagef", "float16": "read_imageh"}[dtype]
        return "\n".join(
            f"{into}[T.Ramp({first}, 1, {TEXEL})] = "
            f'T.call_pure_extern("{dtype}x{TEXEL}", "{read}", {name}.data, {index} + {first // TEXEL})'
            for first in range(0, lanes, TEXEL)
        )

    def store(self, name: str, index: str, value: str) -> str:
        stored = self.buffers[name].dtype
        if stored == "float32":
            return f"{name}[{index}] = {value}"
        if self.native:
            return f'{name}[{index}] = T.Cast("{stored}", {value})'
        return f'T.evaluate(T.call_extern("void", "vstore_half", {value}, 0, T.address_of({name}[{index}])))'

    def store_lanes(self, name: str, index: str, source: str, at: str, lanes: int) -> str:
        """Neighbouring float32 numbers of private memory, as a statement."""
        if lanes == 1:
            return self.store(name, index, f"{source}[{at}]")
        if self.buffers[name].dtype == "float16" and not self.native:
            stored = f"{source}[T.Ramp({at}, 1, {lanes})], 0, T.address_of({name}[{index}])"
            return f'T.evaluate(T.call_extern("void", "vstore_half{lanes}", {stored}))'
        return nest(f"for v in T.vectorized({lanes}):", self.store(name, f"{index} + v", f"{source}[{at} + v]"))


@dataclass(frozen=True)
class Program:
    """`grid` work-groups (bx, by, bz) of `group` work-items (tx, ty) each, and what each of them does.

    In the body every buffer is flat; `private` ones belong to a work-item, `halves` likewise but of the `narrow` type,
    `shared` ones to a work-group, `staged` likewise but narrow. `hidden` registers are those of functions it calls.
    """

    grid: Sequence[int]
    group: Sequence[int]
    body: str
    private: Mapping[str, int] = field(default_factory=dict)
    narrow: str = "float16"
    halves: Mapping[str, int] = field(default_factory=dict)
    shared: Mapping[str, int] = field(default_factory=dict)
    staged: Mapping[str, int] = field(default_factory=dict)
    hidden: int = 0

    @property
    def usage(self) -> tuple[int, int, int]:
        """Work-items, bytes of local memory, and registers of a work-item if all it has is alive at once."""
        wide, narrow = DTYPES["float32"].bytes, DTYPES[self.narrow].bytes
        halves = blocks(narrow * sum(self.halves.values()), wide)
        registers = INDICES + self.hidden + sum(self.private.values()) + halves
        local = wide * sum(self.shared.values()) + narrow * sum(self.staged.values())
        return int(np.prod(tuple(self.group))), local, registers

    def scratch(self) -> Iterator[tuple[str, int, str, str]]:
        """Name, size, type and place of all it works in."""
        for place, dtype, found in (
            ("local", "float32", self.private),
            ("local", self.narrow, self.halves),
            ("shared", "float32", self.shared),
            ("shared", self.narrow, self.staged),
        ):
            yield from ((name, size, dtype, place) for name, size in found.items())


class Kernel(ABC):
    """One kind of kernel: a frozen dataclass of all that decides what it computes; `dtype` is how images are stored."""

    NAME: ClassVar[str]
    KNOBS: ClassVar[type]

    @property
    @abstractmethod
    def reads(self) -> dict[str, Buffer]:
        """The parameters but the last, by name."""

    @property
    @abstractmethod
    def out(self) -> Buffer:
        """The last parameter."""

    @abstractmethod
    def offered(self, limits: Limits) -> list[Any]:
        """Tilings, the default first."""

    @abstractmethod
    def program(self, limits: Limits, tiling: Any) -> Program:
        """What it does with a tiling."""

    def memory(self, limits: Limits) -> Memory:
        return Memory({**self.reads, "out": self.out}, limits.half)

    def tilings(self, limits: Limits) -> list[Any]:
        """The tilings that the device can run, the default first."""
        return list(self._fitting(limits))

    def default(self, limits: Limits) -> Any | None:
        """The tiling to take where nothing was tuned; None where the device can run none."""
        return next(self._fitting(limits), None)

    def _fitting(self, limits: Limits) -> Iterator[Any]:
        distinct = dict.fromkeys(self.offered(limits))
        return (tiling for tiling in distinct if limits.excess(*self.program(limits, tiling).usage) is None)

    def generated(self, limits: Limits, tiling: Mapping[str, int] | None = None) -> tirx.PrimFunc:
        """The loops, with a tiling or with the default one."""
        chosen = self.KNOBS(**tiling) if tiling else self.default(limits)
        program = self.program(limits, chosen)
        lines = [
            f'{name} = T.decl_buffer(({buffer.size},), "{buffer.dtype}", data={name}_.data)'
            for name, buffer in self._parameters.items()
        ]
        threads = [(f"b{axis}", extent, f"blockIdx.{axis}") for axis, extent in zip("xyz", program.grid, strict=False)]
        threads += [
            (f"t{axis}", extent, f"threadIdx.{axis}") for axis, extent in zip("xyz", program.group, strict=False)
        ]
        inner = [
            f'{name} = T.alloc_buffer(({size},), "{dtype}", scope="{place}")'
            for name, size, dtype, place in program.scratch()
        ]
        text = "\n".join([*inner, *([IN_TURN] if limits.overlaps else []), program.body])
        for variable, extent, thread in reversed(threads):
            # WebGPU has no third extent of work-groups, which is a batch of one as a rule.
            is_one = (thread, extent) == ("blockIdx.z", 1)
            loop = "range(1)" if is_one else f'T.thread_binding({extent}, thread="{thread}")'
            text = nest(f"for {variable} in {loop}:", text)
        attributes = {"tirx.kernel_launch_params": [OVERLAPPING]} if limits.overlaps else {}
        return _read(self._signature(attributes) + indent("\n".join([*lines, text]), "    "))

    @property
    def spec(self) -> KernelSpec:
        """The kernel as data: the fields that are not at their default are its attributes."""
        found = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {each.name: getattr(self, each.name) for each in found if getattr(self, each.name) != each.default}
        epilogue = getattr(self, EPILOGUE, Epilogue()).steps
        values.pop(EPILOGUE, None)
        inputs = [Tensor(name, buffer.extents, buffer.dtype) for name, buffer in self.reads.items()]
        out = Tensor("out", self.out.extents, self.out.dtype)
        return KernelSpec.of(PREFIX + self.NAME, inputs, (), [out], values, epilogue)

    @classmethod
    def of(cls, spec: KernelSpec) -> Kernel:
        """The kernel that a spec describes."""
        epilogue = {EPILOGUE: spec.epilogue} if hasattr(cls, EPILOGUE) else {}
        return cls(**dict(spec.attrs), **epilogue)

    @property
    def _parameters(self) -> dict[str, Buffer]:
        return {**self.reads, "out": self.out}

    def _signature(self, attributes: Mapping[str, Any]) -> str:
        params = ", ".join(
            f'{name}_: T.Buffer({buffer.extents}, "{buffer.dtype}")' for name, buffer in self._parameters.items()
        )
        attrs = {"tirx.noalias": True, "op_pattern": OPAQUE, **attributes}
        return f"@T.prim_func(private=True, s_tir=True)\ndef {self.NAME}({params}):\n    T.func_attr({attrs!r})\n"


class Lone(Kernel):
    """One that reads a single buffer, of the type that it writes.

    Of those TVM asks whether they only reshape, and looks for the answer in a block, which must be there.
    """

    def generated(self, limits: Limits, tiling: Mapping[str, int] | None = None) -> tirx.PrimFunc:
        func = super().generated(limits, tiling)
        return func.with_body(s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", func.body)))


@dataclass(frozen=True)
class Launch:
    """A kernel and the values that it is called with, by the names that they have in the spec of the graph."""

    kernel: Kernel
    reads: tuple[str, ...]
    writes: str

    @property
    def name(self) -> str:
        return self.kernel.NAME

    @property
    def buffers(self) -> list[tuple[str, Buffer]]:
        """What it reads, by the names of the region."""
        return list(zip(self.reads, self.kernel.reads.values(), strict=True))


@dataclass(frozen=True)
class Launches:
    """The launches of a spec, in order; the first reads "x", the last writes "out". Constants by name."""

    launches: list[Launch]
    constants: dict[str, np.ndarray]


# Blocks of one shape have the same text.
_read = cache(read)


def nest(header: str, *parts: str) -> str:
    """Statements within a loop or a condition."""
    return header + "\n" + indent("\n".join(parts), "    ")


def blocks(work: int, size: int) -> int:
    """How many pieces of a size cover the work."""
    return -(-work // size)
