"""saevit-tvm bench: how fast, beside the other runtimes or another artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import artifact_argument, common, file
from saevit_tvm.support.errors import UsageError


@click.command(
    "bench",
    short_help="Time an artifact beside other runtimes.",
    help="Time an artifact, in turns with other runtimes of the same float32 model; or with one OTHER artifact, where "
    "a few percent matter.",
)
@artifact_argument
@click.argument("other", required=False, type=file)
@click.option("--threads", type=int, help="For every runtime alike; by default all cores.")
@click.option(
    "--against",
    help="torch, torch-compile, onnxruntime, openvino, ncnn, mnn, executorch, litert, with commas between; or 'none'. "
    "By default every one that is installed, here or for the Python that SAEVIT_TVM_PEERS_PYTHON names.",
)
@click.option("--runs", type=click.IntRange(1), help="Timed answers of each, in place of --seconds.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Timed seconds of each.",
)
@click.option(
    "--pairs",
    type=click.IntRange(1),
    help="Processes of each of two artifacts, in turns, among which its time is divided. [default: 10]",
)
@click.option(
    "--emulated",
    is_flag=True,
    help="Count what one inference executes, under qemu or by a GPU's kernels: a model, not a time.",
)
@click.option("--batch", type=int, help="Of an artifact for several batches: which one. [default: the largest]")
@click.option("--weights", help="The file the artifact's weights came from, where they came from a file.")
@common
def command(artifact: Path, other: Path | None, emulated: bool, as_json: bool, **options: Any) -> None:
    console = Console(as_json)
    if other is not None:
        _two(console, (artifact, other), emulated, **options)
    elif options.pop("pairs") is not None:
        raise UsageError("--pairs is for two artifacts: give another one, or leave it out.")
    elif emulated:
        _emulated(console, artifact)
    else:
        _one(console, artifact, **options)


def _one(console: Console, artifact: Path, against: str | None, **options: Any) -> None:
    from saevit_tvm.verbs.bench import bench

    named = None if against is None else [name for name in against.replace("none", "").split(",") if name]
    result = bench(artifact, against=named, say=console.say, **options)
    console.object(result)
    _print(console, result)


def _two(
    console: Console,
    artifacts: tuple[Path, Path],
    emulated: bool,
    against: str | None,
    weights: str | None,
    batch: int | None,
    **options: Any,
) -> None:
    from saevit_tvm.verbs.pair import emulated_pair, pair

    for name, value in (("--against", against), ("--weights", weights), ("--batch", batch)):
        if value is not None:
            raise UsageError(f"{name} means nothing beside two artifacts: leave it out, or give one artifact.")
    result = emulated_pair(artifacts, console.say) if emulated else pair(artifacts, say=console.say, **options)
    console.object(result)
    if emulated:
        _print_emulated_pair(console, result)
    else:
        _print_pair(console, result)


def _emulated(console: Console, artifact: Path) -> None:
    from saevit_tvm.verbs.counted import emulated

    result = emulated(artifact, console.say)
    console.object(result)
    if "launches" in result:
        _print_modelled(console, result)
        return
    console.line(f"{result['model']}, one inference, one thread, {result['machine']}; {result['kind']}")
    total = result["instructions"]
    rows = [[name, f"{count}", f"{100 * count / total:.1f}"] for name, count in result["classes"].items()]
    console.table(["instructions", "count", "percent"], [*rows, ["all", str(total), "100.0"]])
    console.line(f"bytes loaded {result['bytes_loaded']}, stored {result['bytes_stored']}")
    console.line(f"float operations {result['float_ops']}, {result['float_ops_per_instruction']:.2f} an instruction")


def _print_modelled(console: Console, result: dict[str, Any]) -> None:
    console.line(f"{result['model']} for {result['target']}, {result['dtype']}, one inference; {result['kind']}")
    memory = f"{1e-6 * result['bytes']:.2f} MB of tensors, {1e-6 * result['bytes_loaded']:.1f} MB asked for by loads"
    images = result["launches_with_images"]
    launches = f"{result['launches']} launches" + (f" ({images} read weights through images)" if images else "")
    console.line(f"{launches}, {1e-6 * result['float_ops']:.1f} M float operations, {memory}")
    rows = [
        [
            f"{device['name']} ({device['chip']})",
            f"{device['roofline_ms']:.3f}",
            f"{100 * device['occupancy']:.0f}",
            f"{device['memory_bound']}",
        ]
        for device in result["devices"]
    ]
    console.table(["GPU", "roofline ms", "lanes busy %", "memory-bound launches"], rows)


def _print(console: Console, result: dict[str, Any]) -> None:
    console.line(f"{result['model']}, {_inputs(result)}, {result['threads']} threads for every runtime")
    rows = [
        [
            f"{row['name']} {row['version']}",
            row["dtype"],
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
    columns = ["runtime", "dtype", "median ms", "p10", "p90", "ours/its", "first ms", "MB", "error", "cores", "runs"]
    console.table(columns, rows)
    for row in result["failed"]:
        console.line(f"{row['name']}: {row['error']}")
    if not result["verified"]:
        console.line("this artifact was never verified: only the answer to one random input was compared, just now")
    if result["note"]:
        console.line(f"alone, because there is no model to give to other runtimes: {result['note']}")
    _print_trips(console, result)


def _inputs(result: dict[str, Any]) -> str:
    from saevit_tvm.runtime.tensors import shown

    shapes = [f"input {shown(each['shape'])} {each['dtype']}" for each in result["inputs"]]
    prepared = " (the others are given float32, prepared outside)" if result["frames"] else ""
    return ", ".join(shapes).replace(" float32", "") + prepared


def _print_trips(console: Console, result: dict[str, Any]) -> None:
    trips = result["core_round_trip_ns"]
    if trips:
        console.line(
            f"core-to-core round trip: median {trips[len(trips) // 2]:.0f} ns, {trips[0]:.0f} to {trips[-1]:.0f}"
        )
    elif result["threads"] > 1:
        console.line("core-to-core round trip: not measured, there is no C compiler")


def _print_pair(console: Console, result: dict[str, Any]) -> None:
    from saevit_tvm.runtime.tensors import shown

    shape, ratios = shown(result["input_shape"]), result["ratios"]
    console.line(f"input {shape}, {result['threads']} threads, {len(ratios)} pairs of processes in turns")
    rows = [
        [
            letter,
            row["artifact"],
            row["dtype"],
            f"{row['median_ms']:.3f}",
            f"{row['p10_ms']:.3f}",
            f"{row['p90_ms']:.3f}",
            f"{row['first_ms']:.0f}",
            str(row["runs"]),
        ]
        for letter, row in zip("AB", result["artifacts"], strict=True)
    ]
    console.table(["", "artifact", "dtype", "median ms", "p10", "p90", "first ms", "runs"], rows)
    console.line(
        f"A/B {result['ratio']:.4f}, the median of the pairs; p10 {result['ratio_p10']:.4f}, "
        f"p90 {result['ratio_p90']:.4f}, all of them {min(ratios):.4f} to {max(ratios):.4f}"
    )
    apart = result["max_abs_difference"]
    far = "NaN or infinity in one of them" if apart is None else f"largest difference {apart:.1e}"
    console.line(f"answers to one random input: {'the same bit for bit' if result['equal'] else far}")
    _print_note(console, result)
    _print_trips(console, result)


def _print_emulated_pair(console: Console, result: dict[str, Any]) -> None:
    first, second = result["artifacts"]
    for letter, row in zip("AB", (first, second), strict=True):
        where = row["machine"] if "machine" in row else row["target"]
        console.line(f"{letter}: {row['artifact']}, {row['model']}, {where}")
    console.line(f"one inference; {result['kind']}")
    rows = [
        [name.replace("_", " "), str(first[name]), str(second[name]), "-" if ratio is None else f"{ratio:.4f}"]
        for name, ratio in result["ratios"].items()
    ]
    console.table(["", "A", "B", "A/B"], rows)
    _print_note(console, result)


def _print_note(console: Console, result: dict[str, Any]) -> None:
    if result["note"]:
        console.line(result["note"])
