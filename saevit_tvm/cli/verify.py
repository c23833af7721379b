"""saevit-tvm verify: does an artifact compute what PyTorch computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saevit_tvm.cli.console import Console, flipped
from saevit_tvm.cli.options import artifact_argument, common
from saevit_tvm.support.errors import ParityError, TargetError


@click.command(
    "verify",
    short_help="Compare an artifact with PyTorch.",
    help="Compare an artifact with the PyTorch model it was built from: on random inputs and, with --data, by how "
    "often both are right about pictures.",
)
@artifact_argument
@click.option("--weights", help="The file its weights came from, where they came from a file.")
@click.option("--device", metavar="rpc://HOST:PORT/KEY", help="Run it on a device behind this RPC tracker.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Pictures of known classes: a folder with one of each class, or a text file of lines PATH CLASS.",
)
@click.option("--limit", metavar="N", type=click.IntRange(1), help="So many of the pictures, evenly spread.")
@common
def command(
    artifact: Path, weights: str | None, device: str | None, data: Path | None, limit: int | None, as_json: bool
) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.verify import verify

    result = verify(artifact, weights, device, data=data, limit=limit, say=console.say)
    console.object(result)
    if result["data"]:
        _print_data(console, artifact, result["data"])
    if result["proof"] == "none":
        raise TargetError(f"not verified: {result['note']}")
    if not result["passed"]:
        raise ParityError(
            f"'{artifact}' deviates from its model by {_figure(result['max_abs_error'])} "
            f"({_figure(result['max_rel_error'])} of the largest value, "
            f"{result['tolerance']:.2g} allowed){flipped(result)}: build it again."
        )
    recorded = result["reference"] == "recorded"
    origin = "the answers recorded when it was built" if recorded else result["reference"]
    console.line(
        f"{artifact}: passed against {origin}, on {result['machine']}, {result['inputs']} random inputs; "
        f"largest deviation {result['max_abs_error']:.2g} (relative {result['max_rel_error']:.2g}, "
        f"{result['tolerance']:.2g} allowed){flipped(result)}"
    )
    if result["note"]:
        console.line(f"not against the model itself: {result['note']}")


def _print_data(console: Console, artifact: Path, data: dict[str, Any]) -> None:
    rows = [(name, data[key]) for name, key in (("the original", "original"), (str(artifact), "artifact"))]
    shares = [[name, *(_percent(row[key]) for key in ("top1", "top5"))] for name, row in rows]
    console.table([f"{data['pictures']} pictures of {data['classes']} classes", "top-1", "top-5"], shares)
    console.line(f"both name the same class for {data['agree']} of {data['pictures']} pictures")
    for name, row in rows:
        if row["not_numbers"]:
            console.line(f"{name} answers NaN or infinity for {row['not_numbers']} of them, which counts as wrong")
    if data["unreadable"]:
        more = data["unreadable"] - len(data["unreadable_names"])
        names = ", ".join(f"'{name}'" for name in data["unreadable_names"]) + (f" and {more} more" if more else "")
        console.line(f"{data['unreadable']} could not be read and are left out: {names}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def _figure(value: float | None) -> str:
    return "NaN or infinity" if value is None else f"{value:.3g}"
