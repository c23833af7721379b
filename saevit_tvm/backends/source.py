"""Kernels as text beside the object files of their host part, each looked at before it is given away.

There is no compiler for Metal or WebGPU to ask, so what is checked is the form: every kernel that the host part
launches is there once, as a kernel, its braces are balanced, and no more buffers are bound than the API promises.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from saevit_tvm.backends.base import Description
from saevit_tvm.backends.gpu import Gpu
from saevit_tvm.compiler import library
from saevit_tvm.compiler.street import Compiled
from saevit_tvm.support.errors import CompileError
from saevit_tvm.targets import Target


@dataclass(frozen=True)
class Language:
    """How kernels are written for an API: the file's suffix, what begins a kernel and binds a buffer, and the most."""

    suffix: str
    kernel: str
    buffer: str
    buffers: int


LANGUAGES = {
    "metal": Language("metal", r"^kernel void (\w+)\(", r"\[\[ buffer\(\d+\) \]\]", 31),
    "webgpu": Language("wgsl", r"^@compute @workgroup_size\([^)]*\)\nfn (\w+)\(", r"var<storage", 8),
}


class Source(Gpu):
    """GPUs whose kernels are only written down: there is no device of the kind here, and no compiler to ask."""

    device, numbers = "", ()

    def executable(self, mod: tvm.IRModule, target: Target, what: str) -> relax.VMExecutable:
        with library.in_one_line(f"{target.kind} {what}"), tvm.transform.PassContext(opt_level=3):
            return relax.build(mod, tvm.target.Target(target.tvm), relax_pipeline=None)

    def link(self, compiled: Compiled, path: Path) -> None:
        super().link(compiled, path)
        _add(compiled.executable, compiled.target.kind, path)

    def generating(self, module: tvm.IRModule, target: Description) -> AbstractContextManager[None]:
        return tvm.transform.PassContext(opt_level=3)


def _add(executable: Any, kind: str, archive: Path) -> None:
    """Put the sources of an executable's kernels into the archive of its objects, one file a kernel."""
    (module,) = [module for module in _modules(executable.mod) if module.kind == kind]
    sections = split(module.inspect_source(), kind)
    with tarfile.open(archive, "a", format=tarfile.USTAR_FORMAT) as tar:
        for name, text in sections.items():
            data = text.encode()
            member = tarfile.TarInfo(f"kernels/{name}.{LANGUAGES[kind].suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _modules(module: Any) -> Iterator[Any]:
    yield module
    for imported in module.imports:
        yield from _modules(imported)


def split(source: str, kind: str) -> dict[str, str]:
    """The source of every kernel by its name: TVM writes them one after the other, each complete in itself."""
    language = LANGUAGES[kind]
    parts = re.split(r"^// Function: (\w+)\n(?=(?:#include|//-|@group|enable))", source, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], (part.strip() + "\n" for part in parts[2::2]), strict=True))
    for name, text in found.items():
        fault = _fault(name, text, language)
        if fault:
            raise CompileError(f"TVM's {kind} source of the kernel '{name}' {fault}: please report the model.")
    if not found or parts[0].strip():
        raise CompileError(f"TVM's {kind} source has another form than is known: use the pinned version of apache-tvm.")
    return found


def _fault(name: str, text: str, language: Language) -> str | None:
    if re.findall(language.kernel, text, re.MULTILINE) != [name]:
        return "does not define that kernel, and it alone"
    if any(text.count(opening) != text.count(closing) for opening, closing in ("()", "[]", "{}")):
        return "has unbalanced brackets"
    bound = len(re.findall(language.buffer, text))
    return f"binds {bound} buffers, of {language.buffers}" if bound > language.buffers else None
