"""bench --emulated: what one inference executes on a foreign CPU, counted under qemu. A model of the work, not a time.

For a GPU there is nothing to count under: see `modelled`.

Two runs that differ by one inference are subtracted, so loading and starting cancel out; one thread, so that
waiting does not count either.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saevit_tvm import backends
from saevit_tvm.emulators import qemu
from saevit_tvm.measure.modelled import modelled
from saevit_tvm.proof import answers as proof
from saevit_tvm.proof import parity
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.runtime.tensors import Inputs, specs_of
from saevit_tvm.support import workspace
from saevit_tvm.support.errors import TargetError


def emulated(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Instructions by class, bytes moved and float operations of one inference; launches and rooflines for a GPU."""
    manifest = read_manifest(path)
    target = manifest["target"]
    if backends.described(manifest).is_gpu:
        return modelled(path)
    if "emulator" not in target:
        raise TargetError(
            f"'{path}' is built for {target['name']}, and only what is built for a foreign CPU is counted under an "
            "emulator: leave out --emulated, or build with --target arm64."
        )
    lacking = qemu.missing(target["arch"])
    if lacking:
        raise TargetError(f"'{path}' cannot be run under an emulator: {lacking}.")
    qemu.foreign_runtime(target["arch"], say)
    say(f"counting under {proof.machine(target, 'qemu')}")
    (inputs,) = parity.random_inputs(specs_of(manifest["inputs"]), 1)
    with workspace.scratch() as scratch:
        fewer, more = (_count(path, inputs, times, scratch) for times in (2, 3))
    one = {name: more[name] - fewer[name] for name in fewer}
    moved = {name: one[name] for name in ("bytes_loaded", "bytes_stored", "float_ops")}
    return {
        "artifact": str(path),
        "model": manifest["model"],
        "machine": proof.machine(target, "qemu"),
        "kind": "counted under an emulator: a model of the work, not a time",
        "threads": 1,
        "instructions": one["instructions"],
        "classes": {name: one[name] for name in qemu.CLASSES},
        **moved,
        "float_ops_per_instruction": one["float_ops"] / max(1, one["instructions"]),
    }


def _count(path: Path, inputs: Inputs, times: int, scratch: Path) -> dict[str, int]:
    counts = scratch / f"counts{times}.json"
    qemu.run(path, [inputs], scratch, times=times, threads=1, count=counts)
    try:
        return json.loads(counts.read_text())
    except (OSError, ValueError) as error:
        raise TargetError("qemu's plugin counted nothing: use qemu 5.2 to 8.2, with plugins enabled.") from error
