"""Kernels of a CPU as object files: each is compiled by itself, once, and kept.

Machine code is most of a build, and weights are no part of it: a model with other weights has the same kernels. So has
an SDK of a library that was built before, and models share some.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx, transform

import schedules
from saevit_tvm.compiler import library
from saevit_tvm.models.identity import code_digest
from saevit_tvm.support import cache, progress
from schedules.cpu.generator import made_from

if TYPE_CHECKING:
    from saevit_tvm.targets import Target

KIND = "kernels"
# Of a kernel that is compiled alone TVM makes the entry of the library, too. A library has many, and one entry: `main`.
NO_ENTRY = ["tirx.AnnotateEntryFunc"]


def executable(mod: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """The graph as bytecode with the weights, and beside it an object file for each kernel."""
    described = tvm.target.Target(target.tvm)
    kernels = {name.name_hint: func for name, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    graph = {name: func for name, func in mod.functions_items() if not isinstance(func, tirx.PrimFunc)}
    made = relax.build(tvm.IRModule(graph, attrs=mod.attrs), described, relax_pipeline=None)
    # In place of kernels TVM imports an empty file in C. One of LLVM's says for which target the weights are packed.
    made.mod.clear_imports()
    made.mod.import_module(tirx.build(tvm.IRModule({}), described))
    with tempfile.TemporaryDirectory(prefix="saevit-tvm-kernels-") as folder:
        path = Path(folder) / "kernel.o"
        # TVM says nothing of the order in a module, and two builds must be alike.
        for number, name in enumerate(sorted(kernels), 1):
            progress.now(f"kernel {number} of {len(kernels)}: {name}")
            path.write_bytes(_object(name, kernels[name], target, path))
            made.mod.import_module(tvm.runtime.load_static_library(str(path), [name]))
    return made


def _object(name: str, kernel: tirx.PrimFunc, target: Target, path: Path) -> bytes:
    """A kernel's machine code: as it was kept, or compiled now, which writes to `path`."""
    alone = tvm.IRModule({name: kernel})
    settings = library.settings(alone)
    settings["disabled_pass"] += NO_ENTRY
    key = _key(name, kernel, target, settings)
    kept = cache.load(KIND, key)
    if kept is not None:
        return kept
    with transform.PassContext(**settings):
        tirx.build(alone, tvm.target.Target(target.tvm)).write_to_file(str(path))
    compiled = path.read_bytes()
    cache.keep(KIND, key, compiled)
    return compiled


def _key(name: str, kernel: tirx.PrimFunc, target: Target, settings: Mapping[str, Any]) -> str:
    """The name of an object file: the same for the same content only, names of variables included.

    An object holds these names, in what it says of wrong arguments. TVM's structural hash leaves them out, and takes
    many loops for the same that are not: `x * 1 + 23` and `x * 4 + 45`. To write a large kernel down takes a quarter
    of a second, so that of loops as a generator made them their origin is told.
    """
    total = hashlib.sha256(json.dumps([name, target.tvm, settings, tvm.__version__]).encode())
    origin = made_from(kernel)
    content = tvm.ir.save_json(kernel) if origin is None else f"{_generators()} {origin}"
    total.update(content.encode())
    return total.hexdigest()


@lru_cache
def _generators() -> str:
    """The digest of the code that makes loops."""
    return code_digest(Path(schedules.__file__).parent)
