"""saevit-tvm doctor: what this machine can do, and what is missing for the rest."""

from __future__ import annotations

from pathlib import Path

import click

from saevit_tvm.cli.app import common, folder
from saevit_tvm.cli.console import Console
from saevit_tvm.errors import SaevitError


@click.command(
    "doctor",
    short_help="Check what this machine can do.",
    help="Check the installation, the tools and this machine.",
)
@click.option("--store", type=folder, help="The tuning store to check.")
@common
def command(store: Path | None, as_json: bool) -> None:
    console = Console(as_json)
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
