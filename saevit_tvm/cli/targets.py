"""saevit-tvm targets: for what it can be built."""

from __future__ import annotations

from typing import Any

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import common


@click.command(
    "targets",
    short_help="List the targets.",
    help="List the targets, and how what is built for them can be verified on this machine.",
)
@common
def command(as_json: bool) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.listing import targets

    listing = targets()
    console.object(listing)
    console.table(
        ["target", "what it is", "computes in", "verified here"],
        [
            [target["name"], target["summary"], ", ".join(target["dtypes"]), _verified(target)]
            for target in listing["targets"]
        ],
    )
    console.line("Also: TVM's own target JSON.")


def _verified(target: dict[str, Any]) -> str:
    """What a build for the target ends with."""
    if target["proof"] == "none":
        return f"no: {target['why']}"
    return f"under qemu, {target['emulator']} model" if target["proof"] == "qemu" else "yes"
