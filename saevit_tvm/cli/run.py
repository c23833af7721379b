"""saevit-tvm run: classify pictures, or answer arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import artifact_argument, common, folder
from saevit_tvm.support.errors import UsageError


@click.command(
    "run",
    short_help="Classify pictures.",
    help="Classify pictures with an artifact; if one cannot be read, none is classified. A model that takes something "
    "else gets its inputs as .npy files, in their order, or as one .npz with their names.",
)
@artifact_argument
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=int, help="How many classes to show. [default: 5, or all if there are fewer]")
@click.option("--out", type=folder, metavar="FILE.npz", help="Where the outputs for .npy files go.")
@common
def command(artifact: Path, images: tuple[Path, ...], top: int | None, out: Path | None, as_json: bool) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs import run

    if all(file.suffix in run.ARRAYS for file in images):
        if top is not None:
            raise UsageError("--top is for pictures: leave it out.")
        result = run.run_arrays(artifact, images, out)
        _warn(console, result)
        console.object(result)
        console.table(["output", "type", "shape", "first values"], list(map(_row, result["outputs"])))
        return
    if out is not None:
        raise UsageError("--out is for the outputs of .npy files: leave it out.")
    result = run.run(artifact, images, top)
    _warn(console, result)
    console.object(result)
    for entry in result["results"]:
        rows = [[best["label"], f"{best['probability'] * 100:.1f}%"] for best in entry["top"]]
        console.table(["class", "probability"], rows, title=entry["image"])


def _warn(console: Console, result: dict[str, Any]) -> None:
    if result["weights"] == "random":
        console.say("warning: the model has random weights, so its answers mean nothing: build it with --weights.")


def _row(output: dict[str, Any]) -> list[str]:
    from saevit_tvm.runtime.tensors import shown

    values = ("NaN or infinity" if value is None else f"{value:.6g}" for value in output["values"])
    return [output["name"], output["dtype"], shown(output["shape"]), ", ".join(values)]
