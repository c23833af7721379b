"""What an artifact answers, found out in a process of its own: on this CPU, or under qemu on a model of another.

Code that was just generated, or that comes from elsewhere, may crash (an instruction this CPU lacks, a bug of
the compiler); here that is a sentence and not the end of the command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.errors import ArtifactError, SaevitError
from saevit_tvm.runtime import cuda, opencl
from saevit_tvm.verbs.child import die_with_parent, import_path

REFUSED = 3


def answers(
    artifact: Path, inputs: Sequence[np.ndarray], scratch: Path, how: str | None = "host"
) -> list[list[np.ndarray]]:
    """The outputs for each input, from a fresh process that loads the file."""
    if how == "qemu":
        from saevit_tvm.runtime import emulator

        return emulator.run(artifact, inputs, scratch)
    asked, answered = scratch / "inputs.npz", scratch / "outputs.npz"
    np.savez(asked, *inputs)
    command = [
        sys.executable,
        "-m",
        "saevit_tvm.verbs.proof",
        str(artifact.absolute()),
        str(asked),
        str(answered),
    ]
    # In a session of its own, so that Ctrl-C reaches only us, and we end it.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": import_path()},
    )
    words = done.stderr.strip().splitlines()
    if done.returncode == REFUSED:
        raise ArtifactError(words[-1])
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = "it was built for another CPU" if name == "SIGILL" else "please report the model"
        raise ArtifactError(f"'{artifact.name}' crashes when it is run ({name}): {hint}.")
    if done.returncode:
        raise ArtifactError(f"'{artifact.name}' cannot be run: {words[-1] if words else 'no reason was given'}.")
    with np.load(answered) as saved:
        outputs = [saved[f"arr_{index}"] for index in range(len(saved.files))]
    each = len(outputs) // len(inputs)
    return [outputs[start : start + each] for start in range(0, len(outputs), each)]


def machine(target: Mapping[str, Any], how: str | None) -> str:
    """What the artifact was run on, in words; `target` is its manifest's."""
    if how == "host" and target["tvm"]["kind"] == "opencl":
        device = opencl.devices()[0]
        return f"{device.name}, driven by {device.platform} {device.driver}"
    if how == "host" and target["tvm"]["kind"] == "cuda":
        gpu = cuda.devices()[0]
        return f"{gpu.name}, sm_{gpu.capability}"
    if how != "qemu":
        return "this machine"
    libc = ", glibc in place of Android's libc" if "android" in target["tvm"].get("mtriple", "") else ""
    return f"qemu, {target['emulator']} model{libc}"


def kind(target: Mapping[str, Any], how: str | None) -> str | None:
    """What such a run proves, in the manifest's words."""
    here = how == "host" and target["tvm"]["kind"] == "opencl"
    if how == "host" and target["tvm"]["kind"] == "cuda":
        return "cuda"
    return opencl.devices()[0].proof if here else how


def _main(artifact: str, asked: str, answered: str) -> None:
    die_with_parent()
    from saevit_tvm.runtime.engine import load
    from saevit_tvm.verbs.parity import as_list

    try:
        engine = load(artifact)
        with np.load(asked) as inputs:
            outputs = [output for x in inputs.files for output in as_list(engine(inputs[x]))]
    except SaevitError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)
    np.savez(answered, *outputs)


if __name__ == "__main__":
    _main(*sys.argv[1:])
