"""saevit-tvm run: classify pictures."""

from __future__ import annotations

from pathlib import Path

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import artifact_argument, common


@click.command(
    "run",
    short_help="Classify pictures.",
    help="Classify pictures with an artifact; if one cannot be read, none is classified.",
)
@artifact_argument
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=int, help="How many classes to show. [default: 5, or all if there are fewer]")
@common
def command(artifact: Path, images: tuple[Path, ...], top: int | None, as_json: bool) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.run import run

    result = run(artifact, images, top)
    if result["weights"] == "random":
        console.say("warning: the model has random weights, so its answers mean nothing: build it with --weights.")
    console.object(result)
    for entry in result["results"]:
        rows = [[best["label"], f"{best['probability'] * 100:.1f}%"] for best in entry["top"]]
        console.table(["class", "probability"], rows, title=entry["image"])
