#!/usr/bin/env python3
"""What one inference asks of a mobile GPU, ours beside ncnn's Vulkan path and MNN's: launches and memory traffic.

    python benchmarks/mobile.py [--models saevit_xs] [--gpus mali-g610,adreno-740]

No phone is here, so nothing is timed, and every row says how its figures were had. Ours are those of
`saevit-tvm bench --emulated`. ncnn runs for real, on a Vulkan driver for CPUs (Debian: mesa-vulkan-drivers,
libvulkan-dev), behind a library that counts what it asks for. MNN's wheel has no OpenCL: counted are the commands that
its graph becomes on its CPU backend, each at least one launch. Answers that are not PyTorch's are not counted. Needs
the Python packages ncnn, pnnx, MNN and onnx; SAEVIT_TVM_PEERS_PYTHON may name a Python that has the latter two.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from command_line import parsed

from saevit_tvm.measure.modelled import modelled
from saevit_tvm.models.opening import open_model
from saevit_tvm.proof import parity
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.peers.process import PeerProcess
from schedules.dtypes import TOLERANCE
from schedules.machines.gpus import GPUS

OURS = "saevit-tvm"
SHORT = f"--models saevit_micro --image-size 32 --gpus mali-g610 --dtypes float32 --runtimes {OURS}"
FOLDER = Path(__file__).parent
Row = dict[str, Any]

HOW = {
    OURS: "read from the compiled kernels; a tensor that a launch touches counts once",
    "ncnn": "counted between ncnn and a Vulkan driver for CPUs: dispatches, and bytes of the buffers bound to them; "
    "its GELU is the tanh formula there, hence its deviation",
    "mnn": "commands of its graph on its CPU backend, each at least one launch; their tensors, and all weights once",
}

# Some runtimes report home what they are used for.
ALONE = "from saevit_tvm.support.child import leave_network; leave_network()\n"
NCNN = """
import ctypes, json, sys
import ncnn, numpy
folder, example, answer, shim = sys.argv[1:]
ncnn.create_gpu_instance(shim)
net = ncnn.Net()
net.opt.use_vulkan_compute = True
for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
    setattr(net.opt, option, False)
assert not net.load_param(folder + "/model.param") and not net.load_model(folder + "/model.bin")
assert net.opt.use_vulkan_compute, "ncnn has left the GPU"
x, counts = numpy.load(example), (ctypes.c_longlong * 2)()
for _ in range(2):
    ctypes.CDLL(shim).counted(counts)
    with net.create_extractor() as extractor:
        extractor.input(net.input_names()[0], ncnn.Mat(x[0]).clone())
        outputs = []
        for name in net.output_names():
            status, mat = extractor.extract(name)
            assert status == 0
            outputs.append(numpy.array(mat)[None])
    ctypes.CDLL(shim).counted(counts)
numpy.savez(answer, *outputs)
del net
print(json.dumps({"launches": counts[0], "bytes": counts[1]}))
"""

MNN = """
import json, sys
import MNN, numpy
folder, example, answer = sys.argv[1:]
names = json.load(open(folder + "/names.json"))
net = MNN.Interpreter(folder + "/model.mnn")
session = net.createSession({"precision": "high", "numThread": 1})
x, commands, bytes_moved = numpy.load(example), [], 0
def size(tensors):
    return 4 * sum(int(numpy.prod(tensor.getShape())) for tensor in tensors)
def before(tensors, command):
    global bytes_moved
    commands.append(command.getType())
    bytes_moved += size(tensors)
    return True
def after(tensors, command):
    global bytes_moved
    bytes_moved += size(tensors)
    return True
entry = net.getSessionInput(session, names["inputs"][0])
entry.copyFrom(MNN.Tensor(x.shape, MNN.Halide_Type_Float, x, MNN.Tensor_DimensionType_Caffe))
net.runSessionWithCallBackInfo(session, before, after)
outputs = []
for name in names["outputs"]:
    found = net.getSessionOutput(session, name)
    host = MNN.Tensor(found.getShape(), MNN.Halide_Type_Float, numpy.zeros(found.getShape(), "float32"),
                      MNN.Tensor_DimensionType_Caffe)
    found.copyToHostTensor(host)
    outputs.append(numpy.array(host.getNumpyData()).reshape(found.getShape()))
numpy.savez(answer, *outputs)
print(json.dumps({"commands": commands, "bytes": bytes_moved}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["saevit_xs"])
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=["mali-g610", "adreno-740"])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--runtimes", type=lambda text: text.split(","), default=list(HOW), help="the rest is kept")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "float16"], help="for ours")
    options = parsed(parser, SHORT)
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            for row in counted(model, options, Path(scratch)):
                keep(options.out, row)
    print((options.out / "mobile.md").read_text())
    return 0


def counted(model: str, options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    if OURS in options.runtimes:
        for dtype in options.dtypes:
            for gpu in options.gpus:
                yield ours(model, gpu, dtype, options.image_size, scratch)
    names = [name for name in COUNTERS if name in options.runtimes]
    if names:
        yield from theirs(model, names, options.image_size, scratch)


def keep(out: Path, row: Row) -> None:
    """Beside what is known already, in whose place it comes."""
    path = out / "mobile.json"
    known = json.loads(path.read_text()) if path.exists() else []
    rows = [each for each in known if _key(each) != _key(row)] + [row]
    rows.sort(key=lambda each: (each["model"], list(HOW).index(each["runtime"]), each["dtype"] != "float32"))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    (out / "mobile.md").write_text(text(rows))


def _key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["runtime"], row["dtype"], row.get("gpu")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def bandwidth(name: str) -> float:
    """Bytes a second, by the makers' figures."""
    return next(1e9 * gpu.gigabytes_per_second for gpu in GPUS if gpu.name == name)


# Ours -----------------------------------------------------------------


def ours(model: str, gpu: str, dtype: str, image_size: int | None, scratch: Path) -> Row:
    """For one GPU and dtype, as kernels differ."""
    options = BuildOptions(model=model, target=gpu, dtype=dtype, image_size=image_size, out=scratch / gpu / dtype)
    told = modelled(build(options, say).artifact)
    (device,) = told["devices"]
    numbers = {name: told[name] for name in ("launches", "bytes", "float_ops")}
    return _row(
        model, OURS, dtype, gpu=gpu, **numbers, roofline_ms=device["roofline_ms"], kinds=_kinds(told["kernels"])
    )


def _kinds(kernels: list[dict[str, Any]]) -> dict[str, int]:
    """Launches by kind of kernel; kernels of one kind differ by a number behind the name."""
    found: Counter[str] = Counter()
    for row in kernels:
        found[row["kernel"].partition("_kernel")[0].rstrip("0123456789")] += row["calls"]
    return dict(found.most_common())


def _row(model: str, runtime: str, dtype: str, **more: Any) -> Row:
    return {"model": model, "runtime": runtime, "dtype": dtype, "how": HOW[runtime], **more}


# Theirs ---------------------------------------------------------------


def theirs(model: str, names: list[str], image_size: int | None, scratch: Path) -> Iterator[Row]:
    source = open_model(model, image_size=image_size)
    ((x,),) = parity.random_inputs(source.inputs, 1)
    expected = source.reference(x)
    np.save(scratch / "example.npy", x)
    import torch

    torch.save(source.module, scratch / "model.pt")
    for name in names:
        say(f"converting {model} for {name}")
        folder = scratch / name
        folder.mkdir()
        paths = {"model": scratch / "model.pt", "example": scratch / "example.npy", "folder": folder}
        order = {"peer": name, "do": "convert"} | {key: str(path) for key, path in paths.items()}
        with PeerProcess(order, 1, scratch) as process:
            process.reply()
        yield COUNTERS[name](model, folder, scratch, expected)


def _ncnn(model: str, folder: Path, scratch: Path, expected: list[np.ndarray]) -> Row:
    shim = scratch / "libcounting.so"
    command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", FOLDER / "vulkan.c", "-o", shim]
    subprocess.run(command, check=True)
    real = ctypes.util.find_library("vulkan")
    if real is None:
        raise SystemExit("there is no Vulkan: install mesa-vulkan-drivers and libvulkan-dev")
    layers = [line.split()[0] for line in (folder / "model.param").read_text().splitlines()[2:]]
    answer = scratch / "ncnn.npz"
    told = _counted("ncnn", NCNN, [folder, scratch / "example.npy", answer, shim], REAL_VULKAN=real)
    deviation = _deviation(answer, expected, "float16")  # its GELU on a GPU is the tanh formula
    return _row(model, "ncnn", "float32", **told, max_abs_error=deviation, layers=dict(Counter(layers).most_common()))


def _mnn(model: str, folder: Path, scratch: Path, expected: list[np.ndarray]) -> Row:
    answer = scratch / "mnn.npz"
    told = _counted("mnn", MNN, [folder, scratch / "example.npy", answer])
    weights = (folder / "model.mnn").stat().st_size
    kinds = dict(Counter(told["commands"]).most_common())
    numbers = {"launches": len(told["commands"]), "bytes": told["bytes"] + weights}
    deviation = _deviation(answer, expected, "float32")
    return _row(model, "mnn", "float32", **numbers, max_abs_error=deviation, commands=kinds)


COUNTERS = {"ncnn": _ncnn, "mnn": _mnn}


def _counted(name: str, program: str, arguments: list[Any], **environment: str) -> dict[str, Any]:
    say(f"counting {name}")
    command = [str(peers.get(name).python() or sys.executable), "-c", ALONE + program, *map(str, arguments)]
    environment |= {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def _deviation(answer: Path, expected: list[np.ndarray], dtype: str) -> float:
    """How far an answer is from PyTorch's; a wrong one is not worth counting."""
    with np.load(answer) as saved:
        found = [saved[each].reshape(wanted.shape) for each, wanted in zip(saved.files, expected, strict=True)]
    deviation = parity.deviation([found], [expected])
    if not deviation.within(TOLERANCE[dtype]):
        raise SystemExit(f"the answer deviates by {deviation.max_abs_error:.3g} from PyTorch's: nothing is counted")
    return deviation.max_abs_error


# Telling --------------------------------------------------------------


def text(rows: list[Row]) -> str:
    columns = ["model", "runtime", "dtype", "launches", "MB moved", "MFLOP", "max error", "model, ms"]
    gpus = list(dict.fromkeys(row["gpu"] for row in rows if "gpu" in row))
    columns += [f"MB alone on {gpu}, ms" for gpu in gpus]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        name = f"{row['runtime']} for {row['gpu']}" if "gpu" in row else row["runtime"]
        launches = f"{'at least ' if row['runtime'] == 'mnn' else ''}{row['launches']}"
        cells = [row["model"], name, row["dtype"], launches, f"{1e-6 * row['bytes']:.1f}"]
        cells.append(f"{1e-6 * row['float_ops']:.0f}" if "float_ops" in row else "")
        cells.append(f"{row['max_abs_error']:.1e}" if "max_abs_error" in row else "")
        cells.append(f"{row['roofline_ms']:.2f}" if "roofline_ms" in row else "")
        cells += [f"{1e3 * row['bytes'] / bandwidth(gpu):.2f}" if row.get("gpu", gpu) == gpu else "" for gpu in gpus]
        lines.append(f"| {' | '.join(cells)} |")
    how = [f"* {runtime}: {words}." for runtime, words in HOW.items()]
    how.append(
        '* "model" is the roofline of every launch, "MB alone" the traffic at the bandwidth of the GPU\'s memory.'
    )
    return "\n".join([*lines, "", "No time was measured; every figure is a count or a model:", "", *how]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
