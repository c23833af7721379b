"""saevit-tvm models: what can be built."""

from __future__ import annotations

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import common


@click.command("models", short_help="List the built-in models.", help="List the models that are built in.")
@common
def command(as_json: bool) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.listing import models

    listing = models()
    console.object(listing)
    console.table(
        ["model", "dims", "depths", "GMACs at 224", "parameters"],
        [
            [
                model["name"],
                " ".join(map(str, model["dims"])),
                " ".join(map(str, model["depths"])),
                f"{model['gmacs']:.2f}",
                f"{model['params'] / 1e6:.2f} M",
            ]
            for model in listing["models"]
        ],
    )
    names = ", ".join(each["model"] for each in listing["tested"])
    console.line(f"Others that were built and compared with PyTorch: {names}.")
    console.line("Also: timm:NAME, a torch.export file (.pt2), or an ONNX file (.onnx).")
