"""saevit-tvm targets: for what it can be built."""

from __future__ import annotations

import click

from saevit_tvm.cli.app import common
from saevit_tvm.cli.console import Console


@click.command(
    "targets",
    short_help="List the targets.",
    help="List the targets, and whether this machine can run what is built for them.",
)
@common
def command(as_json: bool) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.listing import targets

    listing = targets()
    console.object(listing)
    console.table(
        ["target", "what it is", "verified here"],
        [
            [target["name"], target["summary"], "yes" if target["runs_here"] else f"no: {target['why']}"]
            for target in listing["targets"]
        ],
    )
    console.line("Also: TVM's own target JSON.")
