"""What an artifact answers on a device that an RPC tracker lends, asked in a process that can be killed.

The device runs the whole artifact with its own copy of TVM's runtime; only inputs and outputs travel.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm import backends
from saevit_tvm.measure.tracker import Device, Tracker, rpc_address
from saevit_tvm.proof.questions import REFUSED, Answers, answer, ask
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.runtime.manifest import batches, entry
from saevit_tvm.runtime.tensors import Inputs, pictures
from saevit_tvm.support.child import without_torch
from saevit_tvm.support.errors import TargetError

SECONDS = 300
QUEUE_SECONDS = 120.0
_NAIVE_ALLOCATOR = 1


def answers(address: str, artifact: Path, inputs: Sequence[Inputs], scratch: Path) -> Answers:
    """The outputs for each input, from the device behind rpc://HOST:PORT/KEY."""
    rpc_address(address)  # wrong syntax is found here
    try:
        reply = ask(__name__, [address, str(artifact.absolute())], inputs, scratch, QUEUE_SECONDS + SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"the device behind {address} gave no answer within {SECONDS} s: look after it.") from error
    if reply.status == REFUSED:
        raise TargetError(reply.words)
    if reply.status:
        reason = reply.words.rstrip(".")
        raise TargetError(f"the device behind {address} cannot run '{artifact.name}': {reason}.")
    return reply.outputs


def _lent(address: str) -> Device:
    """A device of the key, as soon as one is free."""
    host, port, key = rpc_address(address)
    tracker = Tracker(host, port)
    tracker.require(key)
    request = tracker.request(key)
    end = time.monotonic() + QUEUE_SECONDS
    try:
        while (device := request.granted()) is None:
            if time.monotonic() > end:
                raise TargetError(
                    f"all devices with the key '{key}' were in use for {QUEUE_SECONDS:.0f} s: try again later."
                )
            wait([request], 1.0)  # type: ignore[list-item]
        return device
    finally:
        request.close()


def _run(address: str, artifact: str, inputs: list[Inputs]) -> list[np.ndarray]:
    import tvm
    from tvm import rpc

    device = _lent(address)  # not before the imports: a device does not wait long for who has asked for it
    session = rpc.connect(device.host, device.port, device.match_key, session_timeout=SECONDS)
    session.upload(artifact)
    machine = session.load_module(Path(artifact).name)["vm_load_executable"]()
    manifest = read_manifest(artifact)
    devices = backends.described(manifest).numbers
    machine["vm_initialization"](*(number for device in devices for number in (device, 0, _NAIVE_ALLOCATOR)))
    cpu, outputs = session.cpu(), []
    for x in inputs:
        name = entry(pictures(x[0].shape), batches(manifest)[-1])
        machine["set_input"](name, *(tvm.runtime.tensor(array, cpu) for array in x))
        machine["invoke_stateful"](name)
        outputs += [tensor.numpy() for tensor in _outputs(machine, name)]
    return outputs


def _outputs(machine: Any, name: str) -> list[Any]:
    """All outputs: the arity is -1 for one that is not a tuple."""
    arity = int(machine["get_output_arity"](name))
    get = machine["get_output"]
    return [get(name)] if arity == -1 else [get(name, index) for index in range(arity)]


if __name__ == "__main__":
    without_torch()
    answer(_run)
