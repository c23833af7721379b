#!/usr/bin/env python3
"""The C SDK on this machine: its two flavours in turns, its memory over many inferences, and minutes of fuzzing.

    python benchmarks/sdk.py [--models saevit_micro,saevit_xs] [--soak 1000000] [--fuzz 120]

Speed is the median of many turns of each flavour. `--soak N` runs N inferences of saevit_micro at 32x32 in each flavour
and says how many pages of memory the process had after a tenth of them and at the end. `--fuzz SECONDS` runs each fuzz
target of tests/sdk for so long (clang). Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from command_line import parsed

from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.sdk import SdkOptions, sdk

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "sdk"
LINKED = ("-lpthread", "-lm", "-ldl")
SHORT = "--models saevit_micro --image-size 32 --threads 1 --turns 1 --soak 100 --fuzz 1"
FLAVOURS = ("static", "shared")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=["saevit_micro", "saevit_xs"])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--soak", type=int, default=0, metavar="N")
    parser.add_argument("--fuzz", type=int, default=0, metavar="SECONDS")
    options = parsed(parser, SHORT)
    lines = ["| model | threads | static, ms | shared, ms | static / shared |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        kit_of = cache(lambda model, image_size: _kit(model, image_size, Path(scratch)))
        for model in options.models:
            kit, _ = kit_of(model, options.image_size)
            for threads in options.threads:
                static, shared = _in_turns(kit, model, threads, options.turns)
                lines.append(f"| {model} | {threads} | {static:.3f} | {shared:.3f} | {static / shared:.2f} |")
                say(lines[-1])
        if options.soak or options.fuzz:
            kit, artifact = kit_of("saevit_micro", 32)
            lines += ["", *_soak(kit, artifact, options.soak)] if options.soak else []
            lines += ["", *_fuzz(kit, artifact, options.fuzz)] if options.fuzz else []
    (options.out / "sdk.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _kit(model: str, image_size: int | None, scratch: Path) -> tuple[Path, Path]:
    """An SDK of both flavours, its examples built, and the artifact that it was made of."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    artifact = build(BuildOptions(model=model, image_size=image_size, out=folder), say).artifact
    sdk(SdkOptions(artifact, folder / "sdk", "both"), say)
    subprocess.run(["make", "-s", "-C", str(folder / "sdk")], check=True)
    return folder / "sdk", folder / "sdk" / "lib" / artifact.name


# Speed ------------------------------------------------------------------


def _in_turns(kit: Path, model: str, threads: int, turns: int) -> tuple[float, float]:
    """Median milliseconds of an inference: each turn is a fresh process of each flavour."""
    artifact = next((kit / "lib").glob(f"{model}*.so"))
    x, shape = kit / "input.raw", read_manifest(artifact)["inputs"][0]["shape"]
    np.random.RandomState(0).standard_normal(shape).astype(np.float32).tofile(x)
    times: dict[str, list[float]] = {flavour: [] for flavour in FLAVOURS}
    repeat = 300 if model == "saevit_micro" else 20
    for _ in range(turns):
        for flavour in FLAVOURS:
            line = [str(kit / f"tensor-{flavour}"), str(x), os.devnull, str(threads), str(repeat), str(artifact)]
            times[flavour].append(float(_once(line).split()[0]))
    return statistics.median(times["static"]), statistics.median(times["shared"])


def _once(line: Sequence[str]) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


# Endurance ------------------------------------------------------------


def _compiled(kit: Path, name: str, flavour: str, *flags: str, compiler: str = "gcc") -> str:
    """A C program of the tests, with a flavour's sources."""
    sources = [*(kit / "src").glob("*.c"), *(kit / "src" / flavour).glob("*.c")]
    sources += [kit / "lib" / "saevit_model.o"] if flavour == "static" else []
    made = kit / f"{Path(name).stem}-{flavour}"
    line = [compiler, "-std=c11", "-O2", "-g", f"-I{kit / 'include'}", f"-I{kit / 'example'}", *flags]
    subprocess.run([*line, str(TESTS / name), *map(str, sources), *LINKED, "-o", str(made)], check=True)
    return str(made)


def _soak(kit: Path, artifact: Path, times: int) -> list[str]:
    lines = []
    for flavour in FLAVOURS:
        say(f"{times} inferences, {flavour}")
        arguments = [str(times), "1", *([str(artifact)] if flavour == "shared" else [])]
        early, late = _once([_compiled(kit, "soak.c", flavour), *arguments]).split()
        lines.append(f"{times} inferences, {flavour}: {early} pages of memory after a tenth of them, {late} at the end")
    return lines


def _fuzz(kit: Path, artifact: Path, seconds: int) -> list[str]:
    lines = []
    flags = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    data = artifact.read_bytes()
    seeds = {
        "fuzz_artifact.c": ("shared", [], data[:64] + data[-4096:]),
        "fuzz_image.c": ("static", [str(kit / "example" / "png.c")], (ROOT / "examples/digit-7.png").read_bytes()),
    }
    for name, (flavour, more, seed) in seeds.items():
        program = _compiled(kit, name, flavour, *flags, *more, compiler="clang")
        corpus = kit / f"corpus-{flavour}"
        corpus.mkdir()
        (corpus / "seed").write_bytes(seed)
        line = [program, f"-max_total_time={seconds}", "-max_len=20000", "-rss_limit_mb=2048", str(corpus)]
        say(shlex.join(line))
        done = subprocess.run(line, capture_output=True, text=True, cwd=kit, check=True)
        lines += [f"{name}: {done.stderr.splitlines()[-1]}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
