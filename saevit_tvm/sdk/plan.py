"""From a compiled model to a plan: kernels in order, and the one place in memory of each of their tensors.

The shapes of a model are constants, so its bytecode is a list without a branch, and a program that follows the
list needs no virtual machine. The kernels are the very code that the library holds.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

from saevit_tvm.compiler.street import memory_plan, run
from saevit_tvm.support.errors import CompileError

if TYPE_CHECKING:
    from saevit_tvm.compiler.street import Compiled

ALIGNMENT = 64
ARENA, WEIGHTS, INPUT = "arena", "weights", "input"
_DTYPE = re.compile(r"(float|int|uint)(8|16|32|64)|bool")
# What the C runtime provides of TVM's, each under the name of the variable through which kernels find it.
_PROVIDED = {b"__TVMBackendParallelLaunch", b"__TVMBackendAllocWorkspace", b"__TVMBackendFreeWorkspace"}


@dataclass(frozen=True)
class Tensor:
    """A tensor and where it lies: in the arena, among the weights, or the caller's input of this number."""

    place: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Step:
    """A kernel's name, and its tensors as indices into the plan's."""

    kernel: str
    tensors: tuple[int, ...]


@dataclass
class Entry:
    """One inference by a function of the library."""

    steps: list[Step] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """The inferences of all functions, one at a time in one arena, with the weights in common."""

    tensors: list[Tensor] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    weights: bytearray = field(default_factory=bytearray)
    arena_size: int = 0
    shared_scratch: int = 0  # once
    scratch_size: int = 0  # for each thread


def plan_of(compiled: Compiled, names: Sequence[str] = ("main",)) -> Plan:
    """The plan of an inference by each of these functions."""
    mod = run(compiled.module, memory_plan(), tvm.target.Target(compiled.target.tvm))
    made = Plan()
    weights = _Weights(made)
    made.entries = [_Reader(made, weights).read(mod[name]) for name in names]
    kernels = {step.kernel for entry in made.entries for step in entry.steps}
    needs = [_scratch(mod[name].body) for name in kernels]
    made.shared_scratch = max((first for first, _ in needs), default=0)
    made.scratch_size = max((each for _, each in needs), default=0)
    return made


def write_kernels(compiled: Compiled, folder: Path) -> list[Path]:
    """The machine code of the kernels, as object files."""
    modules = list(compiled.executable.mod.imports)
    if not all(module.is_compilation_exportable() and not module.imports for module in modules):
        raise CompileError("only models that run on the CPU alone can be linked statically: use --flavour shared.")
    paths = [folder / f"kernel{number}.o" for number, _ in enumerate(modules)]
    wanted: set[bytes] = set()
    for path, module in zip(paths, modules, strict=True):
        module.write_to_file(str(path), "o")
        wanted |= set(re.findall(rb"\0(__TVM\w+)(?=\0)", path.read_bytes())) - _PROVIDED
    if wanted:
        names = ", ".join(sorted(name.decode().strip("_") for name in wanted))
        raise CompileError(f"the model's kernels need {names} of TVM's runtime: use --flavour shared.")
    return paths


class _Weights:
    """Puts constants among the weights of a plan, equal ones once."""

    def __init__(self, plan: Plan) -> None:
        self._weights = plan.weights
        self._offsets: dict[bytes, int] = {}

    def place(self, constant: tvm.ir.GenericConst) -> int:
        values = constant.value.numpy().tobytes()
        key = hashlib.sha256(values).digest()
        if key not in self._offsets:
            self._offsets[key] = offset = _aligned(len(self._weights))
            self._weights.extend(bytes(offset - len(self._weights)))
            self._weights.extend(values)
        return self._offsets[key]


class _Reader:
    """Follows the bindings of a function, after memory was planned and before they become bytecode."""

    def __init__(self, plan: Plan, weights: _Weights) -> None:
        self._plan, self._weights = plan, weights
        self._entry = Entry()
        self._arena = 0
        self._values: dict[Any, Any] = {}  # variable -> index of a tensor, offset of a storage, or a list of indices
        self._constants: dict[Any, int] = {}

    def read(self, function: relax.Function) -> Entry:
        for number, parameter in enumerate(function.params):
            self._values[parameter] = self._tensor(INPUT, number, parameter.ty)
        for block in function.body.blocks:
            for binding in block.bindings:
                self._values[binding.var] = self._value(binding.value, binding.var)
        result = self._value(function.body.body, None)
        self._entry.outputs = result if isinstance(result, list) else [result]
        self._plan.arena_size = max(self._plan.arena_size, self._arena)
        return self._entry

    def _value(self, value: Any, var: Any) -> Any:
        if isinstance(value, relax.Var):
            return self._values[value]
        if isinstance(value, tvm.ir.GenericConst):
            return self._constant(value)
        if isinstance(value, relax.Tuple):
            return [self._value(item, None) for item in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value, None)[value.index]
        if isinstance(value, relax.Call):
            return self._call(value, var)
        raise _no_place_for(type(value).__name__)

    def _call(self, call: relax.Call, var: Any) -> Any:
        if isinstance(call.op, tvm.ir.GlobalVar):
            tensors = tuple(self._value(argument, None) for argument in call.args)
            if not all(isinstance(index, int) for index in tensors):
                raise _no_place_for(f"the arguments of '{call.op.name_hint}'")
            self._entry.steps.append(Step(call.op.name_hint, tensors))
            return None
        name = call.op.global_symbol if isinstance(call.op, relax.ExternFunc) else call.op.name
        if name == "relax.memory.alloc_storage":
            offset = self._arena
            self._arena += _aligned(math.prod(int(size) for size in call.args[0].values))
            return offset
        if name == "relax.memory.alloc_tensor":
            return self._tensor(ARENA, self._values[call.args[0]] + int(call.args[1].value), var.ty)
        if name in ("relax.reshape", "vm.builtin.reshape"):
            source = self._plan.tensors[self._value(call.args[0], None)]
            return self._tensor(source.place, source.offset, var.ty)
        raise _no_place_for(f"'{name}'")

    def _constant(self, constant: tvm.ir.GenericConst) -> int:
        if constant not in self._constants:
            self._constants[constant] = self._tensor(WEIGHTS, self._weights.place(constant), constant.ty)
        return self._constants[constant]

    def _tensor(self, place: str, offset: int, info: Any) -> int:
        shape, dtype = tuple(int(extent) for extent in info.shape), str(info.dtype)
        if not _DTYPE.fullmatch(dtype):
            raise _no_place_for(f"tensors of {dtype}")
        self._plan.tensors.append(Tensor(place, offset, shape, dtype))
        return len(self._plan.tensors) - 1


def _no_place_for(what: str) -> CompileError:
    return CompileError(f"the static flavour has no place for {what}: use --flavour shared.")


def _scratch(body: Any) -> tuple[int, int]:
    """The most scratch memory that a kernel needs at a time, as if all its buffers lived at once.

    First what the thread that calls it needs besides, then what every thread needs: buffers inside parallel loops,
    and those that lowering may still move there.
    """
    everywhere: list[int] = []
    fixed: list[int] = []
    parallel: list[int] = []

    def count(sizes: list[int], *buffers: Any) -> None:
        sizes.extend(math.prod(map(int, each.shape)) * np.dtype(each.dtype).itemsize for each in buffers)

    def look_inside(loop: Any) -> None:
        if loop.kind == tirx.ForKind.PARALLEL:
            tvm_ffi.structural_walk(loop.body, (tirx.AllocBuffer, lambda node: count(parallel, node.buffer)))

    movable = s_tir.SBlock, lambda node: count(everywhere, *node.alloc_buffers)
    in_place = tirx.AllocBuffer, lambda node: count(fixed, node.buffer)
    tvm_ffi.structural_walk(body, (movable, in_place, (tirx.For, look_inside)))
    whole, each = _room(fixed), _room(parallel) + _room(everywhere)
    return max(0, whole - _room(parallel)), each


def _room(sizes: list[int]) -> int:
    """Every block of scratch memory has a header before it."""
    return sum(ALIGNMENT + _aligned(size) for size in sizes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
