"""saevit-tvm rpc-server: what a board needs to measure and verify for this machine."""

from __future__ import annotations

from pathlib import Path

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import common, folder, target_option


@click.command(
    "rpc-server",
    short_help="Make the RPC server for a board.",
    help="Make the program that a board runs to measure and verify for this machine: no Python needed there.",
)
@target_option
@click.option("--out", type=folder, default=Path("rpc"), show_default=True, help="The folder to put it in.")
@common
def command(target: str, out: Path, as_json: bool) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.rpc_server import rpc_server

    result = rpc_server(target, out)
    console.object(result)
    console.line(f"{result['program']} for {result['target']}, {result['bytes'] / 1e6:.1f} MB with its libraries")
    console.line(f"how to start it on the board: {result['readme']}")
