"""The devices that an artifact can compute on: the runtime's own table, by TVM's word for the kind of target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saevit_tvm.runtime import abi, cuda, opencl
from saevit_tvm.support.errors import ArtifactError

Manifest = dict[str, Any]


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device: TVM's number for it, how TVM's runtime gets it, and whether it can run an artifact.

    `one_at_a_time`: the first inference captures a graph, and while it does, no other thread of the process may
    reserve memory or copy, so all engines take turns.
    """

    number: int
    activate: Callable[[], None]
    check: Callable[[Manifest, Any], None]
    one_at_a_time: bool = False


def device_kind(manifest: Manifest, path: Any) -> DeviceKind:
    """What an artifact computes on, or one ArtifactError where this runtime has no such device."""
    kind, name = manifest["target"]["tvm"]["kind"], manifest["target"]["name"]
    if kind not in _TABLE:
        raise ArtifactError(
            f"'{path}' is built for a device of kind {kind} (target {name}), and "
            "this saevit-tvm runs those for CPUs, CUDA and OpenCL: build with --target native."
        )
    return _TABLE[kind]


def _check_opencl(manifest: Manifest, path: Any) -> None:
    there, reason = opencl.available()
    if not there:
        raise ArtifactError(f"'{path}' needs an OpenCL device (target {manifest['target']['name']}), and {reason}.")


_TABLE = {
    "llvm": DeviceKind(abi.CPU, lambda: None, lambda _manifest, _path: None),
    "opencl": DeviceKind(opencl.OPENCL, lambda: opencl.activate(), _check_opencl),
    "cuda": DeviceKind(cuda.CUDA, lambda: cuda.activate(), cuda.check_device, one_at_a_time=True),
}
