#!/usr/bin/env python3
"""Other people's models: does each build, how far is it from PyTorch, and with --speed, how fast is it beside others.

    python benchmarks/zoo.py [--resume]             build all and write the table
    python benchmarks/zoo.py --speed [--resume]     and time each at one and at two threads
    python benchmarks/zoo.py --speed --tune 10 --draw 6 --threads 2    six of them, tuned for ten minutes each
    python benchmarks/zoo.py --gpu [--resume]       for GPUs, at 64 pixels or a few more, in float32 and float16
    python benchmarks/zoo.py --models timm:resnet18,mine.onnx --variants plain,features

With --speed, the floor of a model is the time of its multiply-adds at the peak that a loop of nothing else reached just
before and after; in brackets is which share of its time a runtime would take at that peak. Ours stands in milliseconds,
others as ours over theirs.

With --gpu, what a kernel computes is compared where this machine can: under an OpenCL driver for CPUs, or behind a
stand-in for NVIDIA's driver; "in float32" where the driver has no arithmetic in float16, "not run here" for code that
was made and not run.

All models are timm's (pip install --no-deps timm), with random weights and random statistics of their norms. Every
build is `saevit-tvm build` in a process of its own, which compares the library with PyTorch on random inputs; what it
imports was imported before, so that the table's seconds are those of the build alone. A model that fails costs its
own row, which holds the sentence that a user would read. Results are written after each row.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import math
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from command_line import RESULTS, parsed, stand_in
from peak import Peak
from rows import lined, say

from saevit_tvm.models import TESTED
from saevit_tvm.support.child import collect_seldom
from saevit_tvm.support.tvm_first import load_tvm_first

MODELS = (
    *("resnet18", "resnet50", "efficientnet_b0", "efficientnet_lite0", "mobilenetv3_small_100"),
    *("mobilenetv4_conv_small", "ghostnetv3_100", "starnet_s1", "repvit_m0_9", "fastvit_t8", "convnext_atto"),
    *("lowformer_b0", "mobilevitv2_050", "edgenext_xx_small", "efficientvit_b0", "efficientformerv2_s0"),
    *("swiftformer_xs", "shvit_s1", "levit_128s", "tiny_vit_5m_224", "coat_lite_tiny", "pvt_v2_b0"),
    *("swin_tiny_patch4_window7_224", "davit_tiny", "vit_tiny_patch16_224", "convit_tiny", "xcit_nano_12_p16_224"),
    *("halonet26t", "maxvit_tiny_tf_224"),
)
# What is asked of some models besides the plain build.
SOME = ("resnet18", "mobilenetv4_conv_small", "edgenext_xx_small", "efficientvit_b0", "shvit_s1")
VARIANTS: dict[str, Sequence[str]] = {
    "plain": MODELS,
    "onnx": (*SOME, "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "repvit_m0_9"),
    "onnx, old exporter": (*SOME, "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "repvit_m0_9"),
    "features": SOME,
    "batch 4": SOME,
    "160x256": SOME,
}
BUILT_WITH: dict[str, list[str]] = {
    "features": ["--features-only"],
    "batch 4": ["--batch", "4"],
    "160x256": ["--image-size", "160x256"],
}
SHORT = (
    "--image-size 64 --variants plain --models timm:resnet18,timm:mobilenetv3_small_100,timm:mobilenetv4_conv_small,"
    "timm:convnext_atto,timm:starnet_s1,timm:efficientvit_b0,timm:shvit_s1,timm:pvt_v2_b0"
)
SIZES = (64, 128, 256)
GPUS = ("generic-opencl", "mali", "adreno", "cuda-sm_90")
OURS = "saevit-tvm"
NEAR_FLOOR = 1.25  # times a model's floor: nobody has much to gain there
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    model: str
    variant: str
    target: str
    dtype: str

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.variant


def main() -> int:
    options = _options()
    file = options.out / f"{'zoo-gpu' if options.gpu else 'zoo-tuned' if options.tune else 'zoo'}.json"
    told = gpu_table if options.gpu else table
    rows: list[Row] = json.loads(file.read_text()) if options.resume and file.exists() else []
    for job in _jobs(options):
        if any((row["model"], row["variant"]) == job.key and _is_done(row, options) for row in rows):
            continue
        say(f"{job.model}, {job.variant}")
        rows = [row for row in rows if (row["model"], row["variant"]) != job.key] + [row_of(job, options)]
        say(f"    {json.dumps({name: value for name, value in rows[-1].items() if name != 'speed'})}")
        _write(file, json.dumps(rows, indent=1) + "\n")
        _write(file.with_suffix(".md"), told(rows))
        if options.out == RESULTS and not (options.gpu or options.tune):
            _write(TESTED, json.dumps(tested(rows), indent=1) + "\n")
    print(told(rows), end="")
    return 1 if any("error" in row for row in rows) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), help="as --model takes them; default: the zoo")
    parser.add_argument("--variants", type=_variants, default=list(VARIANTS), help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--target", default="native")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--image-size", help="in place of each model's own")
    parser.add_argument("--speed", action="store_true", help="also time each beside other runtimes")
    parser.add_argument(
        "--gpu", action="store_true", help=f"for {', '.join(GPUS)}, plain, at --image-size or 64, 128 or 256"
    )
    parser.add_argument(
        "--in-turn", action="store_true", help="with --gpu: each model for one of them only, in one type"
    )
    parser.add_argument("--tune", type=float, help="first tune each for so many minutes, for each of --threads")
    parser.add_argument("--draw", type=int, help="no more than so many of the models, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=lambda text: text.split(","), default=["1", "2"])
    parser.add_argument("--against", default="onnxruntime,openvino,ncnn,torch-compile")
    parser.add_argument("--seconds", type=float, default=5.0, help="measuring time of each runtime")
    parser.add_argument("--minutes", type=float, default=15.0, help="the longest that one build may take")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has already")
    options = parsed(parser, SHORT)
    if options.tune:
        options.variants = [f"tuned for {options.tune:g} min"]
    return options


def _variants(text: str) -> list[str]:
    chosen = [part.strip() for part in text.replace("onnx, old", "onnx; old").split(",")]
    chosen = [part.replace(";", ",") for part in chosen]
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    return chosen


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    if options.gpu:
        ways = list(product(GPUS, ("float32", "float16")))
        for at, model in enumerate(_drawn(MODELS, options)):
            for target, dtype in [ways[at % len(ways)]] if options.in_turn else ways:
                yield Job(model, f"{target} {dtype}", target, dtype)
        return
    for variant in options.variants:
        for model in _drawn(VARIANTS.get(variant, MODELS), options):
            yield Job(model, variant, options.target, options.dtype)


def _drawn(named: Sequence[str], options: argparse.Namespace) -> list[str]:
    models = options.models or [f"timm:{name}" for name in named]
    return random.Random(options.seed).sample(models, options.draw) if options.draw else models


def _is_done(row: Row, options: argparse.Namespace) -> bool:
    return "error" not in row and (not options.speed or ("speed" in row and "multiply_adds" in row))


def _write(file: Path, text: str) -> None:
    """The whole file or the one before: an interrupted run keeps what it had."""
    unfinished = file.with_suffix(f"{file.suffix}.part")
    unfinished.write_text(text)
    unfinished.replace(file)


# One row --------------------------------------------------------------


def row_of(job: Job, options: argparse.Namespace) -> Row:
    row: Row = {"model": job.model, "variant": job.variant}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = _exported(job, Path(scratch), options) if job.variant.startswith("onnx") else job.model
            line = ["--target", job.target, "--dtype", job.dtype, *BUILT_WITH.get(job.variant, [])]
            line += ["--model", model]
            if size := options.image_size or (_small(model) if options.gpu else None):
                line += ["--image-size", size]
            if options.tune:
                row["trials"] = {count: _tuned(line, count, Path(scratch), options) for count in options.threads}
                line += ["--store", scratch]
            line += ["--out", scratch]
            built = _built(["--no-cache", *line], options.minutes * 60)
            manifest = json.loads(Path(built["manifest"]).read_text())
            row |= {
                "input": "x".join(map(str, manifest["inputs"][0]["shape"])),
                "seconds": built["seconds"],
                "kernels": built["kernels"]["total"],
                "rules": built["kernels"]["fallback"],
                "proof": built["verification"]["proof"],
                "max_rel_error": built["verification"]["max_rel_error"],
                "multiply_adds": built["work"]["multiply_adds"],
                "left_multiply_adds": built["left_to_rules"]["multiply_adds"],
                "left_time": built["left_to_rules"]["time"],
            }
            if options.gpu:
                row |= _launched(manifest)
            if options.speed:
                cut = {str(manifest["target"]["tvm"].get("num-cores")): built["artifact"]}
                for count in options.threads:
                    cut[count] = cut.get(count) or _cut(line, count, options)
                row["speed"] = [found for count in options.threads for found in _timed(cut[count], count, options)]
        except _Failed as failed:
            row["error"] = str(failed)
    return row


def _small(model: str) -> str:
    """The smallest of some sizes that a model takes."""
    from saevit_tvm.models.opening import open_model
    from saevit_tvm.support.errors import SaevitError

    _import_for_all()
    for size in SIZES:
        with contextlib.suppress(SaevitError):
            open_model(model, image_size=size)
            return str(size)
    raise _Failed(f"it takes none of {SIZES}")


def _launched(manifest: Row) -> Row:
    """What an inference asks of a GPU, and how far its kernels are from PyTorch where this CPU ran them."""
    launches = manifest["launches"]
    told = {
        "launches": sum(each["calls"] for each in launches),
        "bytes": sum(each["calls"] * each["bytes"] for each in launches),
        "tolerance": manifest["verification"]["tolerance"],
    }
    if arithmetic := manifest["verification"].get("arithmetic"):
        told |= {"max_rel_error": arithmetic["max_rel_error"], "proof": "stand-in"}
    if manifest["verification"].get("widened"):
        told["proof"] = "pocl, in float32"
    return told


class _Failed(Exception):
    """With the sentence that stood on stderr."""


def _built(arguments: list[str], seconds: float) -> Any:
    """What `saevit-tvm build` prints as JSON: a fork of this process, which has imported for all what each needs."""
    _import_for_all()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        line = ["build", *arguments, "--json"]
        build = multiprocessing.get_context("fork").Process(target=_command, args=(line, out.fileno(), err.fileno()))
        build.start()
        build.join(seconds)
        if build.is_alive():
            build.kill()
            build.join()
            raise _Failed(_late(seconds))
        for file in (out, err):
            file.seek(0)
        if build.exitcode:
            raise _Failed(_last_words(err.read(), build.exitcode))
        return json.load(out)


@functools.cache
def _import_for_all() -> None:
    collect_seldom()
    load_tvm_first()
    sys.path += stand_in()
    for name in ("torch._dynamo", "torch.export._trace", "tvm.relax.frontend.torch", "timm"):
        with contextlib.suppress(ImportError):  # without timm there are models in files
            importlib.import_module(name)
    gc.freeze()


def _command(line: list[str], out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv[1:] = line
    runpy.run_module("saevit_tvm", run_name="__main__")


def _done(command: list[str], seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise _Failed(_late(seconds)) from error
    if done.returncode:
        raise _Failed(_last_words(done.stderr, done.returncode))
    return done.stdout


def _late(seconds: float) -> str:
    return f"stopped after {seconds / 60:.0f} minutes"


def _last_words(said: str, status: int) -> str:
    return (said.strip().splitlines() or [f"it ended with status {status}"])[-1]


def _environment() -> dict[str, str]:
    paths = [os.environ.get("PYTHONPATH", ""), *stand_in()]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


EXPORT = """
import sys, torch
from saevit_tvm.models.opening import open_model
name, size, dynamo, out = sys.argv[1:]
source = open_model(name, image_size=int(size) if size else None)
torch.onnx.export(source.module, (torch.zeros(source.input_shape),), out, dynamo=dynamo == "new")
"""


def _exported(job: Job, scratch: Path, options: argparse.Namespace) -> str:
    """The model as .onnx, written by PyTorch."""
    out = str(scratch / f"{job.model.rpartition(':')[2]}.onnx")
    exporter = "old" if "old" in job.variant else "new"
    started = time.monotonic()
    _done([sys.executable, "-c", EXPORT, job.model, options.image_size or "", exporter, out], options.minutes * 60)
    say(f"    exported in {time.monotonic() - started:.0f} s")
    return out


def _cut(line: list[str], threads: str, options: argparse.Namespace) -> str:
    """The artifact for so many threads: work that is cut for two costs one thread a little more."""
    return str(_built([*line, "--threads", threads], options.minutes * 60)["artifact"])


def _tuned(line: list[str], threads: str, store: Path, options: argparse.Namespace) -> int:
    """Records for so many threads, in a store that had none; how many trials that took."""
    how = ["--threads", threads, "--minutes", str(options.tune), "--store", str(store), "--json"]
    command = [sys.executable, "-m", "saevit_tvm", "tune", *line, *how]
    return int(json.loads(_done(command, (options.minutes + options.tune) * 60))["trials"])


def _timed(artifact: str, threads: str, options: argparse.Namespace) -> list[Row]:
    before = _peak().gflops()
    bench = ["bench", artifact, "--threads", threads, "--against", options.against]
    command = [sys.executable, "-m", "saevit_tvm", *bench, "--seconds", str(options.seconds), "--json"]
    told = json.loads(_done(command, options.minutes * 60))
    trips = told["core_round_trip_ns"]
    shared = {"round_trip_ns": trips[len(trips) // 2] if trips else None}
    shared["peak_gflops"] = int(threads) * max(before, _peak().gflops())
    keys = ("name", "version", "threads", "median_ms", "p10_ms", "p90_ms", "ratio", "error")
    return [shared | {key: row[key] for key in keys if key in row} for row in [*told["results"], *told["failed"]]]


@cache
def _peak() -> Peak:
    from saevit_tvm.targets import native

    return Peak(native().tvm)


# Telling --------------------------------------------------------------


def table(rows: list[Row]) -> str:
    columns = ["model", "variant", "input", "largest deviation", "kernels", "by rules"]
    columns += ["multiply-adds by rules", "time by rules, 1 thread", "build s"]
    counts = sorted({found["threads"] for row in rows for found in row.get("speed", [])})
    names = sorted({found["name"] for row in rows for found in row.get("speed", [])})
    for threads in counts:
        columns += [f"floor, {_threads(threads)}", *(f"{name}, {_threads(threads)}" for name in names)]
    cells = [
        [*_cells(row), *(text for threads in counts for text in (_floor(row, threads), *_speeds(row, threads, names)))]
        for row in rows
    ]
    return lined(columns, cells) + "".join(f"\n{_summary(rows, threads)}\n" for threads in counts)


def gpu_table(rows: list[Row]) -> str:
    columns = ["model", "for", "largest deviation", "allowed", "proof", "launches", "MB", "multiply-adds by rules"]
    cells = []
    for row in rows:
        head = [row["model"].removeprefix("timm:"), row["variant"]]
        if "error" in row:
            cells.append([*head, f"does not build: {row['error']}", *[""] * 6])
            continue
        megabytes, left = f"{row['bytes'] / 1e6:.1f}", _percent(row["left_multiply_adds"])
        proof = [_deviation(row), f"{row['tolerance']:.0e}", row["proof"]]
        cells.append([*head, *proof, str(row["launches"]), megabytes, left, f"{row['seconds']:.0f}"])
    built = [row for row in rows if "error" not in row]
    most = max((row["left_multiply_adds"] for row in built), default=0.0)
    told = f"{len(built)} of {len(rows)} build; at the most {_percent(most)} of the multiply-adds are by rules."
    return lined([*columns, "build s"], cells) + f"\n{told}\n"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _cells(row: Row) -> list[str]:
    head = [row["model"].removeprefix("timm:"), row["variant"]]
    if "error" in row:
        return [*head, f"does not build: {row['error']}", "", "", "", "", "", ""]
    left = ["" if (share := row.get(name)) is None else _percent(share) for name in ("left_multiply_adds", "left_time")]
    return [
        *head,
        row["input"],
        _deviation(row),
        str(row["kernels"]),
        str(row["rules"]),
        *left,
        f"{row['seconds']:.0f}",
    ]


def _deviation(row: Row) -> str:
    error = row["max_rel_error"]
    return "not run here" if error is None else f"{error:.1e}"


def tested(rows: list[Row]) -> list[Row]:
    """What `saevit-tvm models` lists: a model that was built for this CPU and is within the tolerance."""
    plain = [row for row in rows if row["variant"] == "plain" and row.get("proof") == "host"]
    return [{key: row[key] for key in ("model", "input", "max_rel_error")} for row in plain]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def floor_ms(row: Row, threads: int) -> float | None:
    """The time of the model's multiply-adds at the peak, where both are known."""
    peaks = [
        found["peak_gflops"] for found in row.get("speed", []) if found["threads"] == threads and "peak_gflops" in found
    ]
    return 2e-6 * row["multiply_adds"] / peaks[0] if peaks and "multiply_adds" in row else None


def _floor(row: Row, threads: int) -> str:
    floor = floor_ms(row, threads)
    return "" if floor is None else f"{floor:.2f}"


def _speeds(row: Row, threads: int, names: Sequence[str]) -> Iterator[str]:
    """Our milliseconds; of the others, ours over theirs; behind it how near the floor each is."""
    found = {each["name"]: each for each in row.get("speed", []) if each["threads"] == threads}
    floor = floor_ms(row, threads)
    for name in names:
        if "error" in found.get(name, {}):
            yield "not measured"
        elif name in found:
            share = "" if floor is None else f" ({100 * floor / found[name]['median_ms']:.0f} %)"
            yield f"{found[name]['median_ms' if name == OURS else 'ratio']:.2f}{share}"
        else:
            yield ""


def _summary(rows: list[Row], threads: int) -> str:
    """Ours over the best of the others, and who is slower than that and no near its floor."""
    ratios: dict[str, float] = {}
    slow = []
    for row in rows:
        timed = [each for each in row.get("speed", []) if each["threads"] == threads and "error" not in each]
        others = [each["ratio"] for each in timed if each["name"] != OURS]
        if not others:
            continue
        name = " ".join(filter(None, [row["model"].removeprefix("timm:"), row["variant"].replace("plain", "")]))
        ratios[name] = max(others)  # to the fastest
        (ours,) = (each["median_ms"] for each in timed if each["name"] == OURS)
        floor = floor_ms(row, threads)
        if ratios[name] > 1 and (floor is None or ours > NEAR_FLOOR * floor):
            slow.append(f"{name} {ratios[name]:.2f}")
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else float("nan")
    behind = f"behind, and not within {NEAR_FLOOR} of the floor: {', '.join(slow)}" if slow else "none is behind"
    return (
        f"{_threads(threads)}: ours over the best of the others, geometric mean of {len(ratios)}: {mean:.2f}; {behind}."
    )


if __name__ == "__main__":
    sys.exit(main())
