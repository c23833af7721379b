"""OpenCL devices: kernels go into the library as OpenCL C, which the device's own driver compiles."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from saevit_tvm.backends.base import Description, StandIn
from saevit_tvm.backends.gpu import Gpu
from saevit_tvm.compiler import library
from saevit_tvm.compiler.street import Compiled
from saevit_tvm.runtime import opencl
from saevit_tvm.runtime.opencl import plugin
from saevit_tvm.support.errors import TargetError
from saevit_tvm.targets import Target
from schedules.machines.gpus import Limits, limits_of

_SOURCE_HOOK = "tvm_callback_opencl_postproc"  # what TVM calls with every kernel's source
PROOF = "pocl"
# PoCL takes twice as long to compile a kernel when it optimises, and a proof runs it a few times only.
IN_A_HURRY = {"POCL_EXTRA_BUILD_FLAGS": "-cl-opt-disable"}
_KERNEL = b"// Function: "  # how a kernel begins
_READ_OF_IMAGE = re.compile(r"\bread_image[fh]\((\w+),")
_HALVES = re.compile(r"\b__global half\* restrict (\w+)")
_HALF = re.compile(r"\b(convert_)?half(\d*)\b(?! ?\*)( (\w+)\[)?")
_IMAGE_OF_HALVES = re.compile(r"\bread_imageh\(")
_ADDRESS = re.compile(r"\bhalf \*\)(\w+)")
_DECLARATION = re.compile(r"^__kernel [^{;]*;\n", re.MULTILINE)


class OpenCL(Gpu):
    device = "opencl"
    numbers = (4, 1)
    board_files = (plugin.NAME,)
    flavours = ("shared",)
    driver = " but its GPU's OpenCL driver"
    driver_compiles = True

    def executable(self, mod: tvm.IRModule, target: Target, what: str) -> relax.VMExecutable:
        with library.in_one_line(f"OpenCL {what}"), generating_kernels(self.understood(target)):
            return relax.build(mod, tvm.target.Target(target.tvm), relax_pipeline=None)

    def understood(self, target: Target) -> Limits:
        """What the driver that compiles the kernels may be asked for."""
        return limits_of(target.tvm)

    def generating(self, module: tvm.IRModule, target: Description) -> AbstractContextManager[None]:
        return generating_kernels(limits_of(target))

    def available(self) -> tuple[bool, str]:
        return opencl.available()

    def activate(self) -> None:
        opencl.activate()

    def prepare(self) -> None:
        plugin.library()

    def names(self) -> list[str]:
        return [device.name for device in opencl.devices()]

    def machine(self) -> str:
        device = opencl.devices()[0]
        return f"{device.name}, driven by {device.platform} {device.driver}"

    def proof(self) -> str:
        return opencl.devices()[0].proof

    def stand_in(self, compiled: Compiled, folder: Path) -> StandIn:
        """PoCL, which computes on the CPU."""
        there, reason = self.available()
        if not there:
            raise TargetError(reason)
        device, proof = opencl.devices()[0], self.stand_in_proof()
        if proof is None:
            raise TargetError(f"{device.name} is no CPU: install PoCL, and take the other's driver away")
        self.prepare()
        widened = limits_of(compiled.target.tvm).half and not device.half
        by = Widened() if widened else self
        return StandIn(by.beside_this_cpu(compiled), self.machine(), proof, IN_A_HURRY, widened)

    def stand_in_proof(self) -> str | None:
        """Of a driver for CPUs; what another one does with kernels for this device nobody knows."""
        found = opencl.devices()
        return PROOF if found and found[0].proof == PROOF else None

    def has_kernels_of(self, artifact: Path, library: Path, stand_in: StandIn) -> bool:
        theirs = kernels_in(artifact)
        if stand_in.widened:
            theirs = [_without_halves(kernel).rstrip() for kernel in theirs]
        return sorted(theirs) == sorted(kernels_in(library))

    def own_libraries(self) -> dict[str, Path]:
        return {plugin.NAME: plugin.library()}

    def add_to(self, folder: Path, target: Target) -> None:
        plugin.compile_for(target, folder)


class Widened(OpenCL):
    """The same for a driver without arithmetic in float16."""

    def understood(self, target: Target) -> Limits:
        return replace(super().understood(target), half=False)


def kernels_in(library: Path) -> list[str]:
    """The sources that a library holds, one a kernel."""
    parts = library.read_bytes().split(_KERNEL)[1:]
    texts = (part.partition(b"\0")[0].decode(errors="replace") for part in parts)
    return [text[: text.rindex("}") + 1] for text in texts]  # behind the last one is what the library has next


@contextlib.contextmanager
def generating_kernels(limits: Limits) -> Iterator[None]:
    """The setting in which kernels become OpenCL C, for a library and for a measurement alike."""
    tvm_ffi.register_global_func(_SOURCE_HOOK, functools.partial(_adapted, limits), override=True)
    try:
        with tvm.transform.PassContext(opt_level=3):
            yield
    finally:
        tvm_ffi.remove_global_func(_SOURCE_HOOK)


def _adapted(limits: Limits, source: str, _target: Any) -> str:
    """One kernel as it is to be compiled: without what TVM says too much, and with what it has no words for."""
    # Every kernel comes with declarations of all others, and none calls another.
    source = _with_images(_DECLARATION.sub("", source))
    return source if limits.half else _without_halves(source)


def _with_images(source: str) -> str:
    """What is read as an image is one, and not a buffer; the plugin wants to know of which numbers."""
    for name in set(_READ_OF_IMAGE.findall(source)):
        buffer = rf"__global (\w+)\* restrict {name}\b"
        source = re.sub(buffer, rf"__read_only image1d_buffer_t {name} /* of \1 */", source)
    return source


def _without_halves(source: str) -> str:
    """For a device without arithmetic in float16: such numbers are read and written by functions that every driver has.

    Our kernels for such devices do so already. TVM's (casts of a float16 input, say) compute with what they read, here
    in float32, and would refuse to be compiled by a driver without; so would ours for other devices, in vectors.
    """
    kept = "\n".join(line for line in source.splitlines() if not line.startswith("#error")) + "\n"
    header, brace, body = kept.partition("{")
    body = _IMAGE_OF_HALVES.sub("read_imagef(", body)
    for name in _HALVES.findall(header):
        body = re.sub(rf"\bvload(\d+)\(0, {name}\b", rf"vload_half\1(0, {name}", body)
        body = re.sub(rf"\bvstore(\d+)(\(.*, 0, {name}\b)", r"vstore_half\1\2", body)
        body = _by_functions(body, name)
    ours = set(_ADDRESS.findall(body))  # arrays that are read and written so already

    def wider(found: re.Match[str]) -> str:
        return found[0] if found[4] in ours else f"{found[1] or ''}float{found[2]}{found[3] or ''}"

    return header + brace + _HALF.sub(wider, body)


def _by_functions(code: str, name: str) -> str:
    """The code without `name[index]`, which is no address: those are sums."""
    found = re.search(rf"\b{name}\[", code)
    if found is None:
        return code
    end = found.end() + _closing(code[found.end() :])
    before, index, after = code[: found.start()], code[found.end() : end], code[end + 1 :]
    if not after.startswith(" = "):
        return f"{before}vload_half({index}, {name}){_by_functions(after, name)}"
    value, _, after = after.removeprefix(" = ").partition(";")
    return f"{before}vstore_half({_by_functions(value, name)}, {index}, {name});{_by_functions(after, name)}"


def _closing(code: str) -> int:
    """Where the bracket closes that was open before the code."""
    depth = 1
    for at, character in enumerate(code):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if not depth:
            return at
    return len(code)
