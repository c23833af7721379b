#!/usr/bin/env python3
"""How much must be put on an ARM board to classify a picture: ours, and the least that other runtimes can do with.

    python benchmarks/sizes.py [--models saevit_micro,saevit_xs,saevit_s] [--ncnn CHECKOUT]

Programs are linked statically and stripped where their makers allow it. With a checkout of ncnn's source, ncnn is built
with the layers that the model uses and no others, and its answer under qemu is compared with PyTorch's. Needs what
arm64.py needs, and g++-aarch64-linux-gnu and cmake for ncnn.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import rows
from command_line import parsed
from foreign import PLATFORMS
from rows import Row, say

from saevit_tvm.emulators import qemu
from saevit_tvm.models.opening import open_model
from saevit_tvm.proof import parity
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.sdk import SdkOptions, sdk
from schedules.dtypes import TOLERANCE

SHORT = "--models saevit_micro --image-size 32 --against ncnn"
# The other runtimes, and whose conversion of the model each is weighed with.
PEERS = {"onnxruntime": "onnxruntime", "ncnn": "ncnn", "executorch": "ncnn"}
SMALL = "LDFLAGS=-static -s -Wl,--gc-sections"
# What ExecuTorch needs of its wheel to run a model with XNNPACK and its own kernels for the rest.
EXECUTORCH = ("libexecutorch", "libexecutorch_backend_xnnpack", "libexecutorch_threadpool")
EXECUTORCH += ("libexecutorch_kernels_optimized",)

NCNN_PROGRAM = """
#include <stdio.h>
#include <vector>
#include "net.h"
int main(int, char** argv) {
  ncnn::Net net;
  net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = false;
  if (net.load_param(argv[1]) || net.load_model(argv[2])) return 1;
  const int size = atoi(argv[3]);
  ncnn::Mat in(size, size, 3), out;
  FILE *from = fopen(argv[4], "rb"), *to = fopen(argv[5], "wb");
  for (int c = 0; c < 3; c++)
    if (fread(in.channel(c), 4, size * size, from) != (size_t)size * size) return 1;
  ncnn::Extractor extractor = net.create_extractor();
  if (extractor.input("in0", in) || extractor.extract("out0", out)) return 1;
  fwrite(out.data, 4, out.w, to);
  return fclose(to);
}
"""
# ncnn's layers make some others by themselves.
NCNN_IMPLIED = {"packing", "cast", "padding", "flatten", "gemm", "split", "convolution", "input", "innerproduct"}
NCNN_OFF = ("OPENMP", "VULKAN", "INT8", "BF16", "PIXEL", "C_API", "PLATFORM_API", "BUILD_BENCHMARK")
NCNN_OFF += ("BUILD_TOOLS", "BUILD_EXAMPLES", "RUNTIME_CPU", "ARM82")


def main() -> int:
    parser = rows.parser(__doc__, ("saevit_micro", "saevit_xs", "saevit_s"), "arm64", tuple(PEERS))
    parser.add_argument("--ncnn", type=Path, help="a checkout of github.com/Tencent/ncnn")
    rows.gather("sizes", parsed(parser, SHORT), measured, table)
    return 0


def measured(model: str, options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    out = scratch / "build"
    build_options = BuildOptions(model=model, target=options.target, image_size=options.image_size, out=out)
    artifact = build(build_options, say).artifact
    yield from ours(artifact, scratch)
    if options.against:
        yield from theirs(model, options, scratch)


# Ours -----------------------------------------------------------------


def ours(artifact: Path, scratch: Path) -> Iterator[Row]:
    told = sdk(SdkOptions(artifact, scratch / "sdk", "both"), say)
    weights = told["workspace"]["weights"]
    folder = scratch / "sdk"
    ways = (("static program, nothing beside it", SMALL), ("static flavour, with the board's C library", "LDFLAGS=-s"))
    for how, flags in ways:
        (folder / "classify-static").unlink(missing_ok=True)
        subprocess.run(["make", "-s", "-C", str(folder), flags, "classify-static"], check=True)
        data = (folder / "classify-static").read_bytes()
        yield {"name": "saevit-tvm", "how": how} | _sizes(len(data) - weights, weights, data)
    subprocess.run(["make", "-s", "-C", str(folder), "LDFLAGS=-s", "classify-shared"], check=True)
    names = ("classify-shared", "lib/libtvm_ffi.so", "lib/libtvm_runtime.so", f"lib/{artifact.name}")
    data = b"".join((folder / name).read_bytes() for name in names)
    yield {"name": "saevit-tvm", "how": "shared flavour: artifact and TVM's runtime"} | _sizes(
        len(data) - weights, weights, data
    )


def _sizes(program: int, weights: int, everything: bytes) -> Row:
    return {"program": program, "weights": weights, "compressed": len(gzip.compress(everything, 9))}


# Others ---------------------------------------------------------------


def theirs(model: str, options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    source = open_model(model, image_size=options.image_size)
    import torch

    torch.save(source.module, scratch / "model.pt")
    np.save(scratch / "example.npy", parity.random_inputs(source.inputs, 1)[0][0])
    weights = {}
    for name in dict.fromkeys(PEERS[name] for name in options.against):
        folder = scratch / name
        folder.mkdir()
        peers.get(name).convert(scratch / "model.pt", scratch / "example.npy", folder)
        weights[name] = sorted(path for path in folder.iterdir() if path.is_file())
    wheels = _wheels(options.against, scratch / "wheels")
    for name in options.against:
        how, program = _least(name, wheels, options.ncnn, source, scratch)
        yield row(name, how, program, weights[PEERS[name]], wheels)


def _least(name: str, wheels: Sequence[Path], ncnn: Path | None, source: Any, scratch: Path) -> tuple[str, list[bytes]]:
    """What is enough of a runtime to run the model, in words and in bytes."""
    if name == "onnxruntime":
        return "libonnxruntime.so of its wheel", _member(wheels, name, "libonnxruntime.so")
    if name == "executorch":
        parts = [part for library in EXECUTORCH for part in _member(wheels, name, f"lib/{library}.so")]
        return "core, XNNPACK and kernels of its wheel; weights as ncnn's", parts
    if ncnn is None:
        return "the module of its wheel", _member(wheels, name, "ncnn.cpython")
    return "static program, only the layers of this model", [_build_ncnn(ncnn, source, scratch).read_bytes()]


def row(name: str, how: str, program: Sequence[bytes], weights: Sequence[Path], wheels: Sequence[Path]) -> Row:
    model = b"".join(path.read_bytes() for path in weights)
    code = b"".join(program)
    version = _wheel(wheels, name).name.split("-")[1]
    return {"name": f"{name} {version}", "how": how} | _sizes(len(code), len(model), code + model)


def _wheels(runtimes: Sequence[str], folder: Path) -> list[Path]:
    """Their wheels for arm64: of the versions that convert here, and of what need not be here the newest."""
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    names = [f"{name}=={metadata.version(name)}" if PEERS[name] == name else name for name in runtimes]
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *platforms]
    subprocess.run([*line, "--python-version", "3.11", "--dest", str(folder), *names], check=True)
    return list(folder.glob("*.whl"))


def _wheel(wheels: Sequence[Path], package: str) -> Path:
    return next(path for path in wheels if path.name.startswith(f"{package}-"))


def _member(wheels: Sequence[Path], package: str, part: str) -> list[bytes]:
    with zipfile.ZipFile(_wheel(wheels, package)) as archive:
        names = [name for name in archive.namelist() if part in name and ".so" in name]
        return [archive.read(name) for name in names]


def _build_ncnn(checkout: Path, source: Any, scratch: Path) -> Path:
    """The smallest static program that computes the model with ncnn, proven under qemu."""
    param = (scratch / "ncnn/model.param").read_text()
    used = {line.split()[0].lower() for line in param.splitlines()[2:] if line.strip()} | NCNN_IMPLIED
    known = re.findall(r"^ncnn_add_layer\((\w+)", (checkout / "src/CMakeLists.txt").read_text(), re.MULTILINE)
    flags = [f"-DWITH_LAYER_{name.lower()}={'ON' if name.lower() in used else 'OFF'}" for name in known]
    flags += [f"-DNCNN_{name}=OFF" for name in NCNN_OFF]
    flags += ["-DNCNN_DISABLE_RTTI=ON", "-DNCNN_DISABLE_EXCEPTION=ON", "-DCMAKE_BUILD_TYPE=MinSizeRel"]
    flags += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    flags += ["-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"]
    made = scratch / "ncnn-build"
    say("building ncnn with the layers of this model")
    for command in (["cmake", "-S", checkout, "-B", made, *flags], ["cmake", "--build", made, "--target", "ncnn"]):
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    (scratch / "main.cpp").write_text(NCNN_PROGRAM)
    program = scratch / "classify-ncnn"
    line = ["aarch64-linux-gnu-g++", "-Os", "-fno-rtti", "-fno-exceptions", *SMALL.split("=", 1)[1].split()]
    line += [f"-I{checkout / 'src'}", f"-I{made / 'src'}", str(scratch / "main.cpp"), str(made / "src/libncnn.a")]
    subprocess.run([*line, "-o", str(program)], check=True)
    x = np.load(scratch / "example.npy")
    x.tofile(scratch / "in.raw")
    arguments = [program, scratch / "ncnn/model.param", scratch / "ncnn/model.bin", str(x.shape[-1])]
    subprocess.run(qemu.command("aarch64", None, [*arguments, scratch / "in.raw", scratch / "out.raw"]), check=True)
    answer = np.fromfile(scratch / "out.raw", np.float32)
    if not parity.deviation([[answer]], [[source.reference(x)[0].ravel()]]).within(TOLERANCE["float32"]):
        raise SystemExit("the small ncnn answers wrongly: it lacks a layer")
    return program


# Telling --------------------------------------------------------------


def table(measured: list[Row]) -> str:
    columns = ["model", "runtime", "", "all but the weights, MB", "weights, MB", "together, MB", "gzip, MB"]
    lines = []
    for each in measured:
        sizes = (each["program"], each["weights"], each["program"] + each["weights"], each["compressed"])
        lines.append([each["model"], each["name"], each["how"], *(f"{size / 1e6:.2f}" for size in sizes)])
    return rows.lined(columns, lines)


if __name__ == "__main__":
    sys.exit(main())
