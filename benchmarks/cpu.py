#!/usr/bin/env python3
"""SAEViT on this CPU beside every other runtime that is installed: one command, one table, one plot.

    python benchmarks/cpu.py [--scenarios all] [--resume]     the comparison
    python benchmarks/cpu.py --ablation                       what each idea is worth

Nothing is installed. Runtimes that do not fit beside this package may live in another environment: name its Python in
SAEVIT_TVM_PEERS_PYTHON. Every comparison is `saevit-tvm bench`: all runtimes in turns, warm, on the same number of
threads (ours built with --threads for it), each one's answer checked before it is timed. Results are written after each
comparison, and --resume goes on after the last one. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from command_line import parsed

from saevit_tvm import targets
from saevit_tvm.support.errors import SaevitError
from saevit_tvm.verbs.bench import prepared
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.peers import OURS

SCENARIOS: dict[str, dict[str, Any]] = {
    "1x224": {},
    "8x224": {"batch": 8},
    "1x512 features": {"image_size": 512, "features_only": True},
}
SHORT = "--models saevit_micro --image-size 32 --scenarios 8x224 --threads 1 --seconds 0.1 --against torch,ncnn"
Row = dict[str, Any]


def main() -> int:
    options = _options()
    if options.ablation:
        rows = ablations(options.models[0], options.threads, options.seconds, options.image_size)
        write(options.out / "ablation", rows, ablation_table)
        print(ablation_table(rows))
        return 0
    stem = options.out / "cpu"
    rows = json.loads(stem.with_suffix(".json").read_text()) if options.resume else []
    for scenario in options.scenarios:
        for model in options.models:
            for found in comparisons(model, scenario, outstanding(rows, model, scenario, options.threads), options):
                rows = [row for row in rows if _place(row) != _place(found[0])] + found
                write(stem, rows, comparison_table)
    print(comparison_table(rows))
    plot(rows, stem.with_suffix(".png"))
    return 1 if any(row["name"] == OURS.name and "error" in row for row in rows) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_listed, default=["saevit_xs", "saevit_s"])
    parser.add_argument("--threads", type=lambda text: [int(n) for n in _listed(text)], default=[1, 2])
    parser.add_argument("--scenarios", type=_scenarios, default=["1x224"], help=f"of: {', '.join(SCENARIOS)}; or all")
    parser.add_argument("--image-size", type=int, help="in place of the scenario's")
    parser.add_argument("--against", type=_listed, help="names as `saevit-tvm bench` has them; default: all installed")
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of each runtime")
    parser.add_argument("--resume", action="store_true", help="keep the comparisons that --out has already")
    parser.add_argument("--ablation", action="store_true", help="only the ablation, of the first model")
    return parsed(parser, SHORT)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _scenarios(text: str) -> list[str]:
    chosen = list(SCENARIOS) if text == "all" else _listed(text)
    if unknown := [name for name in chosen if name not in SCENARIOS]:
        raise argparse.ArgumentTypeError(f"no scenario {unknown[0]!r}")
    return chosen


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Comparing ------------------------------------------------------------


def outstanding(rows: Sequence[Row], model: str, scenario: str, threads: Sequence[int]) -> list[int]:
    """The numbers of threads at which this was not measured yet."""
    done = {_place(row) for row in rows if row["name"] == OURS.name and "error" not in row}
    return [count for count in threads if (model, scenario, count) not in done]


def comparisons(model: str, scenario: str, threads: Sequence[int], options: argparse.Namespace) -> Iterator[list[Row]]:
    """One model in one scenario, converted once for all, then measured at each number of threads."""
    if not threads:
        return
    wanted = SCENARIOS[scenario] | ({"image_size": options.image_size} if options.image_size else {})
    left = list(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours = BuildOptions(model=model, out=Path(folder), **wanted)
            cut = {count: build(replace(ours, threads=count), say).artifact for count in left}
            with prepared(cut[left[0]], against=options.against, weights=None, say=say) as comparison:
                while left:
                    say(f"{model}, {scenario}, {left[0]} threads")
                    told = comparison.of(cut[left[0]]).measure(threads=left[0], runs=None, seconds=options.seconds)
                    left.pop(0)
                    yield rows_of(model, scenario, told)
    except SaevitError as error:
        say(f"{model}, {scenario}: {error}")
        for count in left:
            yield [{"model": model, "scenario": scenario, "threads": count, "name": OURS.name, "error": str(error)}]


def rows_of(model: str, scenario: str, told: dict[str, Any]) -> list[Row]:
    trips = told["core_round_trip_ns"]
    trip = trips[len(trips) // 2] if trips else None
    return [
        {"model": model, "scenario": scenario, "round_trip_ns": trip} | row
        for row in [*told["results"], *told["failed"]]
    ]


def _place(row: Row) -> tuple[str, str, int]:
    return row["model"], row["scenario"], row["threads"]


# Telling --------------------------------------------------------------


def write(stem: Path, rows: list[Row], table: Callable[[list[Row]], str]) -> None:
    """Both files at once or neither: an interrupted run keeps what it had."""
    for suffix, text in ((".json", json.dumps(rows, indent=1) + "\n"), (".md", table(rows))):
        unfinished = stem.with_suffix(f"{suffix}.part")
        unfinished.write_text(text)
        unfinished.replace(stem.with_suffix(suffix))


def comparison_table(rows: list[Row]) -> str:
    columns = ["model", "input", "threads", "round trip ns", "runtime", "arithmetic", "median ms", "p10", "p90"]
    columns += ["ours / its", "first ms", "MB", "max error"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        trip = f"{row['round_trip_ns']:.0f}" if row.get("round_trip_ns") else ""
        cells = [row["model"], row["scenario"], str(row["threads"]), trip]
        if "error" in row:
            cells += [row["name"], f"not measured: {row['error']}"] + [""] * 7
        else:
            cells += [f"{row['name']} {row['version']}", row["dtype"]]
            cells += [f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms", "ratio")]
            cells += [f"{row['first_ms']:.0f}", f"{row['size'] / 1e6:.1f}", f"{row['max_abs_error']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Bars of every runtime's median, one panel a model, scenario and number of threads."""
    pyplot = _pyplot()
    measured = [row for row in rows if "error" not in row]
    panels = list(dict.fromkeys(_place(row) for row in measured))
    if pyplot is None or not panels:
        return
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(3.4 * across, 3.0 * down), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        bars = sorted((row for row in measured if _place(row) == panel), key=lambda row: -row["median_ms"])
        colours = ["tab:red" if row["name"] == OURS.name else "tab:gray" for row in bars]
        drawn = axis.barh([row["name"] for row in bars], [row["median_ms"] for row in bars], color=colours)
        axis.bar_label(drawn, fmt="%.1f", fontsize=7, padding=2)
        axis.margins(x=0.15)
        threads = "1 thread" if panel[2] == 1 else f"{panel[2]} threads"
        axis.set_title(f"{panel[0]} {panel[1]}, {threads}", fontsize=8)
        axis.set_xlabel("ms", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any | None:
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# What each idea is worth ----------------------------------------------


def ablations(model: str, threads: Sequence[int], seconds: float, image_size: int | None = None) -> list[Row]:
    """One after the other, each in a process of its own: TVM's threads, once started, become no more."""
    asked = [(model, count, seconds, image_size) for count in threads]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as process:
        return [row for rows in process.starmap(ablation, asked, chunksize=1) for row in rows]


def ablation(model: str, threads: int, seconds: float, image_size: int | None) -> list[Row]:
    """The same model with one idea more at a time, its kernels cut for the threads, measured in turns."""
    from stages import STAGES, in_turns

    from saevit_tvm.models.opening import open_model

    source, target = open_model(model, image_size=image_size), targets.native().cut_for(threads)
    example = np.random.RandomState(0).standard_normal(source.input_shape).astype("float32")
    expected = source.reference(example)[0]
    executables = {}
    for name, make in STAGES.items():
        say(f"compiling for {threads} threads: {name}")
        executables[name] = make(source, target)
    rows = []
    for name, (times, answer) in in_turns(executables, example, threads, seconds).items():
        error = float(np.abs(answer - expected).max())
        row = {"model": model, "stage": name, "threads": threads, "median_ms": statistics.median(times)}
        rows.append(row | {"runs": len(times), "max_abs_error": error})
    return rows


def ablation_table(rows: list[Row]) -> str:
    lines = ["| model | threads | | median ms | max error |", "|---|---|---|---|---|"]
    for row in rows:
        head = f"| {row['model']} | {row['threads']} | {row['stage']} |"
        lines.append(f"{head} {row['median_ms']:.2f} | {row['max_abs_error']:.1e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
