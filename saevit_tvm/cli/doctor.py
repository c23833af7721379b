"""saevit-tvm doctor: what this machine can do, and what is missing for the rest."""

from __future__ import annotations

from pathlib import Path

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import common, folder
from saevit_tvm.support.errors import SaevitError


@click.command(
    "doctor",
    short_help="Check what this machine can do.",
    help="Check the installation, the tools and this machine.",
)
@click.option("--store", type=folder, help="The tuning store to check.")
@click.option("--rpc", metavar="HOST:PORT", help="Say what this RPC tracker sees, and nothing else.")
@common
def command(store: Path | None, rpc: str | None, as_json: bool) -> None:
    console = Console(as_json)
    if rpc is not None:
        _tracker(console, rpc)
        return
    from saevit_tvm.verbs.doctor import doctor

    result = doctor(store)
    console.object(result)
    rows = [
        ["ok" if check["ok"] else "MISSING" if check["needed"] else "-", check["name"], check["detail"]]
        for check in result["checks"]
    ]
    console.table(["", "check", "finding"], rows)
    missing = [check["name"] for check in result["checks"] if check["needed"] and not check["ok"]]
    if missing:
        raise SaevitError(f"this machine is not ready: see {', '.join(missing)}.")
    console.line("ready to build and verify for this machine")


def _tracker(console: Console, address: str) -> None:
    from saevit_tvm.verbs.tracker import tracker

    result = tracker(address)
    console.object(result)
    columns = ["key", "servers", "free", "busy", "pending"]
    addresses: dict[str, list[str]] = {row["key"]: [] for row in result["keys"]}
    for server in result["servers"]:
        addresses[server["key"]].append(server["address"])
    rows = [[*(str(row[column]) for column in columns), " ".join(addresses[row["key"]])] for row in result["keys"]]
    console.table([*columns, "where"], rows)
    if not result["servers"]:
        console.line(f"the tracker at {result['tracker']} answers, and no server has come to it yet")
