"""saevit-tvm bench: how fast, beside the other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saevit_tvm.cli.app import artifact_argument, common
from saevit_tvm.cli.console import Console


@click.command(
    "bench",
    short_help="Time an artifact beside other runtimes.",
    help="Time an artifact, in turns with other runtimes of the same float32 model.",
)
@artifact_argument
@click.option("--threads", type=int, help="For every runtime alike; by default all cores.")
@click.option(
    "--against",
    help="torch, torch-compile, onnxruntime, openvino, ncnn, with commas between; or 'none'. "
    "By default every one that is installed.",
)
@click.option("--runs", type=click.IntRange(1), help="Timed answers of each runtime, in place of --seconds.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Timed seconds of each runtime.",
)
@click.option("--weights", help="The file the artifact's weights came from, where they came from a file.")
@common
def command(artifact: Path, against: str | None, as_json: bool, **options: Any) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.bench import bench

    named = None if against is None else [name for name in against.replace("none", "").split(",") if name]
    result = bench(artifact, against=named, say=console.say, **options)
    console.object(result)
    _print(console, result)


def _print(console: Console, result: dict[str, Any]) -> None:
    shape = "x".join(map(str, result["input_shape"]))
    console.line(f"{result['model']}, input {shape}, float32, {result['threads']} threads for every runtime")
    rows = [
        [
            row["name"],
            f"{row['median_ms']:.2f}",
            f"{row['p10_ms']:.2f}",
            f"{row['p90_ms']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['first_ms']:.0f}",
            f"{row['size'] / 1e6:.1f}",
            f"{row['max_abs_error']:.1e}",
            f"{row['cores_used']:.2f}",
            str(row["runs"]),
        ]
        for row in result["results"]
    ]
    columns = ["runtime", "median ms", "p10", "p90", "ours/its", "first ms", "MB", "error", "cores", "runs"]
    console.table(columns, rows)
    for row in result["failed"]:
        console.line(f"{row['name']}: {row['error']}")
    if result["note"]:
        console.line(f"alone, because there is no model to give to other runtimes: {result['note']}")
    trips = result["core_round_trip_ns"]
    if trips:
        console.line(
            f"core-to-core round trip: median {trips[len(trips) // 2]:.0f} ns, {trips[0]:.0f} to {trips[-1]:.0f}"
        )
    elif result["threads"] > 1:
        console.line("core-to-core round trip: not measured, there is no C compiler")
