#!/usr/bin/env python3
"""What one inference executes on an ARM core: ours beside onnxruntime and ncnn, counted under the same emulator.

    python benchmarks/arm64.py [--models saevit_xs,timm:resnet50] [--target rpi5]

A count of instructions is a model of the work, not a time. One thread; float32, but for one row; every answer is
compared with PyTorch's before it counts; two runs that differ by one inference are subtracted, so starting and loading
cancel out. Needs Debian with qemu-user, gcc-aarch64-linux-gnu and libstdc++6-arm64-cross, and the Python packages onnx,
onnxruntime, ncnn and pnnx; the arm64 wheels of the other runtimes and a Python for them are downloaded once, into the
cache folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import rows
from command_line import parsed, stand_in
from foreign import Guest
from rows import Row, say

from saevit_tvm import targets
from saevit_tvm.emulators import qemu
from saevit_tvm.models.opening import open_model
from saevit_tvm.proof import parity
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.support.child import import_path
from saevit_tvm.support.errors import ParityError
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.counted import emulated
from saevit_tvm.verbs.sdk import SdkOptions, sdk
from schedules.dtypes import TOLERANCE

OURS = "saevit-tvm"
PEERS = ("onnxruntime", "ncnn")
SHORT = "--models saevit_micro --image-size 32 --target rpi4 --against ncnn"
PARTS = ("instructions", "fma", "vector", "scalar", "load", "store", "branch", "bytes_loaded", "bytes_stored")

# Runs in the guest. The runtimes are loaded and called there as `saevit-tvm bench` does it here.
WORKER = """
import sys
from pathlib import Path
import numpy
from saevit_tvm.verbs import peers
name, folder, example, answer, times = sys.argv[1:]
compute, x = peers.get(name).load(Path(folder), 1), numpy.load(example)
for _ in range(int(times)):
    outputs = compute(x)
numpy.savez(answer, *outputs)
"""


def main() -> int:
    options = parsed(rows.parser(__doc__, ("saevit_xs",), "rpi5", PEERS), SHORT)
    sys.path += stand_in()
    rows.gather("arm64", options, counted, table)
    return 0


# Counting -------------------------------------------------------------


def counted(model: str, options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Ours as a library, as a static program and in float16 where the target can, then everyone else."""
    artifact = _built(model, options, "float32", scratch)
    manifest = read_manifest(artifact)
    head = {"target": options.target, "machine": manifest["verification"]["machine"]}
    library = _library(artifact)
    yield head | library

    source = open_model(model, image_size=options.image_size)
    ((x,),) = parity.random_inputs(source.inputs, 1)
    expected = source.reference(x)
    np.save(scratch / "example.npy", x)
    answer, counts = _static(artifact, manifest, x, scratch)
    yield head | _row(f"{OURS}, static program", library["version"], _error([answer], expected), counts)
    if "float16" in targets.get(options.target).dtypes:
        try:
            yield head | _library(_built(model, options, "float16", scratch), f"{OURS}, float16")
        except ParityError as error:  # some models make too much of roundings
            say(f"{model} in float16 is left out: {error}")

    if not options.against:
        return
    packages = [f"{name}=={metadata.version(name)}" for name in ("numpy", *options.against)]
    guest = Guest(packages, manifest["target"]["emulator"], manifest["target"]["features"])
    import torch

    torch.save(source.module, scratch / "model.pt")
    for name in options.against:
        try:
            row = _peer(name, model, expected, guest, scratch)
            yield head | row | {"ratio": library["instructions"] / row["instructions"]}
        except Exception as error:  # every runtime fails in its own way, and costs its own row
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            say(f"{name}: {reason}")
            yield head | {"name": name, "version": metadata.version(name), "error": reason}


def _peer(name: str, model: str, expected: list[np.ndarray], guest: Guest, scratch: Path) -> Row:
    say(f"converting {model} for {name}")
    folder = scratch / name
    folder.mkdir()
    peers.get(name).convert(scratch / "model.pt", scratch / "example.npy", folder)
    answers, counts = _foreign(guest, name, folder, scratch)
    return _row(name, metadata.version(name), _error(answers, expected), counts)


def _built(model: str, options: argparse.Namespace, dtype: str, scratch: Path) -> Path:
    """Its work cut for one thread, as the others are told to have one."""
    told = {"image_size": options.image_size, "dtype": dtype, "threads": 1}
    return build(BuildOptions(model=model, target=options.target, out=scratch / dtype, **told), say).artifact


def _library(artifact: Path, name: str = OURS) -> Row:
    manifest = read_manifest(artifact)
    counts = emulated(artifact, say)
    error = manifest["verification"]["max_abs_error"]
    return _row(name, manifest["versions"]["saevit_tvm"], error, counts | counts["classes"])


def _row(name: str, version: str, error: float, counts: dict[str, Any]) -> Row:
    """`ratio` is of the instructions of our library to someone else's."""
    say(f"{name}: {counts['instructions'] / 1e6:.1f} million instructions")
    row = {"name": name, "version": version, "ratio": None, "max_abs_error": error}
    return row | {part: counts[part] for part in PARTS}


def _error(answers: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """How far an answer is from PyTorch's; a wrong one is not worth counting."""
    deviation = parity.deviation([[a.reshape(e.shape) for a, e in zip(answers, expected, strict=True)]], [expected])
    if not deviation.within(TOLERANCE["float32"]):
        raise ParityError(f"the answer deviates by {deviation.max_abs_error:.3g} from PyTorch's: nothing is counted")
    return deviation.max_abs_error


def _difference(counts: list[dict[str, int]]) -> dict[str, int]:
    fewer, more = counts
    return {name: more[name] - fewer[name] for name in fewer}


def _static(
    artifact: Path, manifest: dict[str, Any], x: np.ndarray, scratch: Path
) -> tuple[np.ndarray, dict[str, int]]:
    """The example program of the SDK, one thread; it answers once, and then so many times more."""
    sdk(SdkOptions(artifact, scratch / "sdk"), say)
    subprocess.run(["make", "-s", "-C", str(scratch / "sdk"), "LDFLAGS=-static", "tensor-static"], check=True)
    x.tofile(scratch / "in.raw")
    counts = []
    for more in (1, 2):
        program = [scratch / "sdk/tensor-static", scratch / "in.raw", scratch / "out.raw", "1", str(more)]
        file = scratch / f"static-{more}.json"
        command = qemu.command("aarch64", manifest["target"]["emulator"], program, count=file)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        counts.append(json.loads(file.read_text()))
    return np.fromfile(scratch / "out.raw", np.float32), _difference(counts)


def _foreign(guest: Guest, name: str, folder: Path, scratch: Path) -> tuple[list[np.ndarray], dict[str, int]]:
    counts, answer = [], scratch / f"{name}.npz"
    for times in (2, 3):
        say(f"counting {times} inferences of {name}")
        file = scratch / f"{name}-{times}.json"
        guest.run(WORKER, name, folder, scratch / "example.npy", answer, times, path=import_path(), count=file)
        counts.append(json.loads(file.read_text()))
    with np.load(answer) as saved:
        return [saved[each] for each in saved.files], _difference(counts)


# Telling --------------------------------------------------------------


def table(counted: list[Row]) -> str:
    columns = ["model", "machine", "runtime", "million instructions", "ours / its", "multiply-adds", "other vector"]
    columns += ["scalar", "loads", "stores", "MB moved", "max error"]
    lines = []
    for row in counted:
        cells = [row["model"], row["machine"], f"{row['name']} {row['version']}"]
        if "error" in row:
            lines.append([*cells, f"not counted: {row['error']}", *[""] * (len(columns) - 4)])
            continue
        cells += [f"{row['instructions'] / 1e6:.1f}", f"{row['ratio']:.2f}" if row["ratio"] else ""]
        cells += [f"{row[part] / 1e6:.1f}" for part in ("fma", "vector", "scalar", "load", "store")]
        cells += [f"{(row['bytes_loaded'] + row['bytes_stored']) / 1e6:.0f}", f"{row['max_abs_error']:.1e}"]
        lines.append(cells)
    return rows.lined(columns, lines)


if __name__ == "__main__":
    sys.exit(main())
