"""What an artifact answers on a device that an RPC tracker lends, asked in a process that can be killed.

The device runs the whole artifact with its own copy of TVM's runtime; only inputs and outputs travel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.errors import SaevitError, TargetError
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.tuning.measurers import rpc_address
from saevit_tvm.tuning.tracker import Device, Tracker
from saevit_tvm.verbs.child import die_with_parent, import_path

REFUSED = 3
SECONDS = 300
QUEUE_SECONDS = 120.0
_NAIVE_ALLOCATOR = 1
_DEVICES = {"llvm": (1,), "opencl": (4, 1), "cuda": (2, 1)}  # where a target's kernels run, and its host part


def answers(address: str, artifact: Path, inputs: Sequence[np.ndarray], scratch: Path) -> list[list[np.ndarray]]:
    """The outputs for each input, from the device behind rpc://HOST:PORT/KEY."""
    rpc_address(address)  # wrong syntax is found here
    asked, answered = scratch / "inputs.npz", scratch / "outputs.npz"
    np.savez(asked, *inputs)
    line = [
        sys.executable,
        "-m",
        "saevit_tvm.verbs.device",
        address,
        str(artifact.absolute()),
        str(asked),
        str(answered),
    ]
    try:
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=QUEUE_SECONDS + SECONDS,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": import_path()},
        )
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"the device behind {address} gave no answer within {SECONDS} s: look after it.") from error
    words = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line[0].isspace()]
    if done.returncode == REFUSED:
        raise TargetError(words[-1])
    if done.returncode:
        reason = words[-1].rstrip(".") if words else "no reason was given"
        raise TargetError(f"the device behind {address} cannot run '{artifact.name}': {reason}.")
    with np.load(answered) as saved:
        outputs = [saved[f"arr_{index}"] for index in range(len(saved.files))]
    each = len(outputs) // len(inputs)
    return [outputs[start : start + each] for start in range(0, len(outputs), each)]


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


def _run(address: str, artifact: str, asked: str, answered: str) -> None:
    import tvm
    from tvm import rpc

    device = _lent(address)  # not before the imports: a device does not wait long for who has asked for it
    session = rpc.connect(device.host, device.port, device.match_key, session_timeout=SECONDS)
    session.upload(artifact)
    machine = session.load_module(Path(artifact).name)["vm_load_executable"]()
    devices = _DEVICES[read_manifest(artifact)["target"]["tvm"]["kind"]]
    machine["vm_initialization"](*(number for device in devices for number in (device, 0, _NAIVE_ALLOCATOR)))
    cpu, outputs = session.cpu(), []
    with np.load(asked) as inputs:
        for name in inputs.files:
            machine["set_input"]("main", tvm.runtime.tensor(inputs[name], cpu))
            machine["invoke_stateful"]("main")
            outputs += [tensor.numpy() for tensor in _outputs(machine)]
    np.savez(answered, *outputs)


def _outputs(machine: Any) -> list[Any]:
    """All outputs: the arity is -1 for one that is not a tuple."""
    arity = int(machine["get_output_arity"]("main"))
    get = machine["get_output"]
    return [get("main")] if arity == -1 else [get("main", index) for index in range(arity)]


if __name__ == "__main__":
    die_with_parent()
    try:
        _run(*sys.argv[1:])
    except SaevitError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
