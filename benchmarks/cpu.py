#!/usr/bin/env python3
"""SAEViT on this CPU beside every other runtime that is installed: one command, one table, one plot.

    python benchmarks/cpu.py --out benchmarks/results

Nothing is installed. Every comparison is `saevit-tvm bench`: all runtimes in turns, warm, on the same number of
threads, parity checked. Run it on an idle machine. The ablation builds the same model with one idea more at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm import targets
from saevit_tvm.verbs.bench import bench
from saevit_tvm.verbs.build import BuildOptions, build

SCENARIOS = {
    "1x224": {},
    "8x224": {"batch": 8},
    "1x512 features": {"image_size": 512, "features_only": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="saevit_xs,saevit_s")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--scenarios", default="1x224", help=f"comma-separated, of: {', '.join(SCENARIOS)}")
    parser.add_argument("--against", default=None, help="comma-separated; default: all that is installed")
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of each runtime")
    parser.add_argument("--ablation", action="store_true", help="only the ablation, of the first model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    models = options.models.split(",")
    threads = [int(count) for count in options.threads.split(",")]
    if options.ablation:
        rows = ablation(models[0], threads, options.seconds)
        _write(options.out / "ablation", rows, ablation_table)
        print(ablation_table(rows))
        return
    against = options.against.split(",") if options.against else None
    rows: list[dict[str, Any]] = []
    for scenario in options.scenarios.split(","):
        for model in models:
            for row in compare(model, scenario, threads, against, options.seconds):
                rows.append(row)
                _write(options.out / "cpu", rows, comparison_table)  # an interrupted run keeps what it has
    print(comparison_table(rows))
    plot(rows, options.out / "cpu.png")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(stem: Path, rows: list[dict[str, Any]], table: Callable[[list[dict[str, Any]]], str]) -> None:
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(rows))


def compare(
    model: str, scenario: str, threads: list[int], against: list[str] | None, seconds: float
) -> Iterator[dict[str, Any]]:
    """One model in one scenario, at each number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        options = BuildOptions(model=model, out=Path(folder), **SCENARIOS[scenario])
        artifact = build(options, say).artifact
        for count in threads:
            say(f"{model}, {scenario}, {count} threads")
            told = bench(artifact, threads=count, against=against, runs=None, seconds=seconds, weights=None, say=say)
            trips = told["core_round_trip_ns"]
            common = {"model": model, "scenario": scenario, "round_trip_ns": trips[len(trips) // 2] if trips else None}
            yield from (common | row for row in [*told["results"], *told["failed"]])


def comparison_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | input | threads | runtime | median ms | p10 | p90 | ours / theirs | first ms | MB | max error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['model']} | {row['scenario']} | {row['threads']} | {row['name']} |"
        if "error" in row:
            lines.append(f"{head} {row['error']} | | | | | | |")
            continue
        times = f" {row['median_ms']:.2f} | {row['p10_ms']:.2f} | {row['p90_ms']:.2f} | {row['ratio']:.2f} |"
        rest = f" {row['first_ms']:.0f} | {row['size'] / 1e6:.1f} | {row['max_abs_error']:.1e} |"
        lines.append(head + times + rest)
    trips = sorted({row["round_trip_ns"] for row in rows if row["round_trip_ns"]})
    if trips:
        lines.append(f"\nCore-to-core round trip during the runs with more threads: {', '.join(map(str, trips))} ns.")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of every runtime's median, one panel a model, scenario and number of threads."""
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if "error" not in row]
    panels = sorted({(row["scenario"], row["model"], row["threads"]) for row in measured})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        bars = [row for row in measured if (row["scenario"], row["model"], row["threads"]) == panel]
        bars.sort(key=lambda row: -row["median_ms"])
        colours = ["tab:red" if row["ratio"] == 1.0 else "tab:gray" for row in bars]
        axis.barh([row["name"] for row in bars], [row["median_ms"] for row in bars], color=colours)
        axis.set_title(f"{panel[1]} {panel[0]}, {panel[2]} threads", fontsize=8)
        axis.set_xlabel("ms")
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# What each idea is worth ---------------------------------------------


def ablation(model: str, threads: list[int], seconds: float) -> list[dict[str, Any]]:
    """The same model with one idea more at a time, measured in turns, in this process."""
    import tvm

    from saevit_tvm.models.sources import open_model

    source, target = open_model(model), targets.native()
    example = np.random.RandomState(0).standard_normal(source.input_shape).astype("float32")
    expected = source.reference(example)[0]
    variants = {name: make(source, target) for name, make in VARIANTS.items()}
    rows = []
    for count in threads:
        tvm.get_global_func("runtime.config_threadpool")(1, count)
        machines = {name: tvm.relax.VirtualMachine(made, tvm.cpu()) for name, made in variants.items()}
        x = tvm.runtime.tensor(example)
        times: dict[str, list[float]] = {name: [] for name in machines}
        end = time.monotonic() + seconds * len(machines)
        while time.monotonic() < end:
            for name, machine in machines.items():
                machine["main"](x)
                start = time.perf_counter()
                machine["main"](x)
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, machine in machines.items():
            error = float(np.abs(machine["main"](x).numpy() - expected).max())
            median = statistics.median(times[name])
            rows.append(
                {"model": model, "variant": name, "threads": count, "median_ms": median, "max_abs_error": error}
            )
    return rows


def _plain(source: Any, target: Any) -> Any:
    import tvm

    from saevit_tvm.compiler.importer import import_model

    return tvm.compile(import_model(source), tvm.target.Target(target.tvm))


def _without_regions(source: Any, target: Any) -> Any:
    import tvm

    from saevit_tvm.compiler import pipeline
    from saevit_tvm.compiler.importer import import_model
    from schedules.cpu.isa import isa_of

    tvm_target = tvm.target.Target(target.tvm)
    mod = import_model(source)
    records = pipeline.apply_records(None, isa_of(target.tvm), 1)
    for passes in (pipeline.simplify(), pipeline.layout(), pipeline.kernels(), records, pipeline.virtual_machine()):
        mod = pipeline.run(mod, passes, tvm_target)
    return tvm.relax.build(mod, tvm_target, relax_pipeline=None)


def _compiled(source: Any, target: Any, *, use_tuned: bool) -> Any:
    from saevit_tvm.compiler.pipeline import compile_model

    return compile_model(source, target, use_tuned=use_tuned).executable


VARIANTS: dict[str, Callable[[Any, Any], Any]] = {
    "plain TVM": _plain,
    "+ BatchNorm folded, channels last, vectorised by rule": _without_regions,
    "+ regions as one kernel each, generated": lambda source, target: _compiled(source, target, use_tuned=False),
    "+ tuned tilings": lambda source, target: _compiled(source, target, use_tuned=True),
}


def ablation_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | threads | | median ms | max error |", "|---|---|---|---|---|"]
    for row in rows:
        head = f"| {row['model']} | {row['threads']} | {row['variant']} |"
        lines.append(f"{head} {row['median_ms']:.2f} | {row['max_abs_error']:.1e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
