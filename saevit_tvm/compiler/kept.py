"""Libraries that were linked before: what has the same scheduled kernels for the same target is not compiled again.

Machine code is most of a build. It follows from the scheduled module, with the weights in it, from the target, from the
compilers, and from the few files of ours that come after.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from tvm_ffi import structural_hash

from saevit_tvm.support import cache, toolchain

if TYPE_CHECKING:
    from saevit_tvm.targets import Target

KIND = "libraries"
ROOT = Path(__file__).parents[2]
BEHIND = ("saevit_tvm/compiler", "saevit_tvm/backends", "saevit_tvm/support", "schedules/machines")


def key(scheduled: tvm.IRModule, target: Target) -> str:
    """The name of a library: the same for the same content only."""
    linker = toolchain.linker(target)
    described = [target.tvm, target.arch, target.link_flags, linker.cc_argv, _file(linker.cc_argv[0]), tvm.__version__]
    total = hashlib.sha256(json.dumps(described).encode())
    # Of all content, weights among it, and the same in every process; as JSON, a module takes a second to write.
    total.update(str(structural_hash(scheduled)).encode())
    for room in BEHIND:
        for file in sorted((ROOT / room).rglob("*.py")):
            total.update(file.read_bytes())
    return total.hexdigest()


def load(name: str) -> bytes | None:
    return cache.load(KIND, name)


def keep(name: str, library: Path) -> None:
    cache.keep(KIND, name, library.read_bytes())


def _file(program: str) -> list[int]:
    """What changes with another version of a program."""
    found = shutil.which(program)
    status = Path(found).stat() if found else None
    return [status.st_size, status.st_mtime_ns] if status else []
