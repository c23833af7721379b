"""Kernels as compiled CUDA code: made from what TVM generates, put into the library in its place, read back.

TVM itself would ship the source, to be compiled where the library is loaded.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saevit_tvm.backends import fatbin, nvrtc
from saevit_tvm.emulators.cuda import kernels_in
from saevit_tvm.support.errors import CompileError
from schedules.machines.nvidia import ARCHITECTURES, REGISTER_UNIT, WARP

_ENTRY = re.compile(r"\.entry (\w+)\(")
# In PTX: a product of two matrices on tensor cores; waiting for the kernel before; what may not come earlier.
_TENSOR_PRODUCT, _WAIT = "wmma.mma.sync", "griddepcontrol.wait"
_TOO_EARLY = re.compile(r"\bbra\b|\b(?:ld|st|red|atom|cp)\.(?!param|shared|local)")


@dataclass(frozen=True)
class DeviceCode:
    """A fat binary, what the manifest says of it, and what it was made from."""

    fat_binary: bytes
    report: dict[str, Any]
    source: str

    @property
    def warnings(self) -> list[str]:
        spilling = [name for name, each in self.report["kernels"].items() if each["spill_bytes"]]
        return [f"these kernels spill registers to memory, which is slow: {', '.join(spilling)}."] if spilling else []


def source_of(module: Any) -> str:
    """The kernels behind TVM's host module, as CUDA C++."""
    return str(_cuda_module(module).inspect_source("cuda"))


def compile_kernels(source: str, architectures: tuple[str, ...], with_ptx: bool = True) -> DeviceCode:
    """Kernels as a fat binary that was checked."""
    threads = kernels_in(source)
    programs, ptx = nvrtc.compile_all(source, architectures, with_ptx)
    packed = nvrtc.fat_binary(programs, ptx)
    kernels = check(packed, architectures, threads, with_ptx)
    for program in programs:
        for name, spilled in program.spills.items():
            kernels[name]["spill_bytes"] = max(kernels[name]["spill_bytes"], spilled)
    for name, text in _texts(ptx):
        kernels[name] |= {"tensor_products": text.count(_TENSOR_PRODUCT), "overlaps": _overlaps(name, text)}
    report = {
        "architectures": list(architectures),
        "ptx": architectures[-1] if with_ptx else None,
        "compiler": nvrtc.version(),
        "source": f"sha256:{hashlib.sha256(source.encode()).hexdigest()}",
        "bytes": len(packed),
        "kernels": dict(sorted(kernels.items())),
    }
    return DeviceCode(packed, report, source)


def _texts(ptx: bytes) -> Iterator[tuple[str, str]]:
    """The kernels, and what each does."""
    _, *parts = _ENTRY.split(ptx.decode("utf-8", "replace"))
    return zip(parts[::2], parts[1::2], strict=True)


def _overlaps(name: str, text: str) -> bool:
    """Whether a kernel begins while the one before it runs; CompileError if it then reads before it waits for that."""
    before, waits, _ = text.partition(_WAIT)
    if waits and _TOO_EARLY.search(before):
        raise CompileError(f"the kernel '{name}' does not wait for its inputs: please report the model.")
    return bool(waits)


def check(
    packed: bytes, architectures: tuple[str, ...], threads: dict[str, int], with_ptx: bool = True
) -> dict[str, dict[str, int]]:
    """Raise CompileError unless every kernel is there for every architecture, within its limits; what each takes."""
    try:
        entries = fatbin.entries(packed)
        found = {(entry.kind, entry.architecture): entry.kernels() for entry in entries}
        cubins = {entry.architecture: fatbin.resources(entry.code) for entry in entries if entry.kind == "cubin"}
    except fatbin.FatbinError as error:
        raise CompileError(f"the compiled kernels cannot be read back ({error}): please report the model.") from error
    wanted = [("cubin", ARCHITECTURES[sm].number) for sm in architectures]
    wanted += [("ptx", ARCHITECTURES[architectures[-1]].number)] if with_ptx else []
    for kind, number in wanted:
        absent = threads.keys() - found.get((kind, number), set())
        if absent:
            raise CompileError(
                f"{len(absent)} kernels have no {kind} for sm_{number}, '{min(absent)}' first: please report the model."
            )
    for sm in architectures:
        for name, each in cubins[ARCHITECTURES[sm].number].items():
            _check_limits(name, each, threads.get(name, 0), sm)
    return {name: _most([cubin[name] for cubin in cubins.values()]) for name in threads}


def _check_limits(name: str, taken: fatbin.Resources, threads: int, sm: str) -> None:
    limits = ARCHITECTURES[sm]
    given = -(-taken.registers // REGISTER_UNIT) * REGISTER_UNIT
    wanted = [
        (threads, limits.threads, "threads in a block"),
        (taken.registers, limits.registers_per_thread, "registers a thread"),
        (given * -(-threads // WARP) * WARP, limits.registers, "registers a block"),
        (taken.shared_bytes, limits.shared_bytes + limits.reserved_bytes, "bytes of shared memory"),
    ]
    for want, have, what in wanted:
        if want > have:
            raise CompileError(
                f"the kernel '{name}' wants {want} {what}, and {sm} has {have}: please report the model."
            )


def _most(every: list[fatbin.Resources]) -> dict[str, int]:
    """What a kernel takes at most, on any architecture."""
    return {
        "registers": max(each.registers for each in every),
        "shared_bytes": max(each.shared_bytes for each in every),
        "stack_bytes": max(each.stack_bytes for each in every),
        "spill_bytes": 0,
    }


# In the library -----------------------------------------------------


def check_library(library: Path, code: DeviceCode) -> None:
    """The linked file holds this very code, and no source of it."""
    data = library.read_bytes()
    if data.count(code.fat_binary) != 1 or b"__global__" in data:
        raise CompileError(f"'{library.name}' does not hold its kernels as compiled code: please report the model.")


def packer(code: DeviceCode) -> Callable[..., str]:
    """What TVM calls to write the modules behind a library's own code: the same as ever, but for the CUDA module."""

    def pack(module: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        import tvm_ffi

        (host,) = [each for each in _modules(module) if each.kind == "llvm"]
        packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        blob = _with_code(packed, source_of(module).encode(), code.fat_binary)
        path = Path(folder) / f"{prefix}devc.o"
        make = tvm_ffi.get_global_func("codegen.codegen_blob")
        make(blob, is_system_lib, host["_get_target_string"](), prefix).write_to_file(str(path))
        return str(path)

    return pack


def _with_code(packed: bytes, source: bytes, fat_binary: bytes) -> bytes:
    """TVM's packed modules with compiled code in place of the source.

    They are [size of all] ... "cuda" [size of the module] [format] [functions] [code] ..., strings with their sizes
    before them.
    """
    kind, whole_source = _string(b"cuda"), _string(source)
    code_at = packed.find(whole_source)
    format_at = packed.rfind(kind, 0, max(0, code_at))  # the format of source has the same name as the module's kind
    start = format_at - 8 - len(kind)
    if start < 8 or not packed.startswith(kind, start):
        raise CompileError("TVM's library does not hold kernels where they should be: install the pinned apache-tvm.")
    functions = packed[format_at + len(kind) : code_at]
    module = _string(b"fatbin") + functions + _string(fat_binary)
    inner = packed[8:start] + kind + _string(module) + packed[code_at + len(whole_source) :]
    return struct.pack("<Q", len(inner)) + inner


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _cuda_module(module: Any) -> Any:
    """The one module of kernels."""
    found = [each for each in _modules(module) if each.kind == "cuda"]
    if len(found) != 1:
        raise CompileError(
            f"TVM made {len(found)} modules of CUDA kernels, and one is expected: please report the model."
        )
    return found[0]


def _modules(module: Any) -> Iterator[Any]:
    yield module
    for each in module.imports:
        yield from _modules(each)
