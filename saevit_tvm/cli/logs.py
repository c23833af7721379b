"""saevit-tvm logs: the tuning store, to look at and to look after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.guard import Guard
from saevit_tvm.cli.options import Commands, common, folder

_PATIENCE = 20.0  # a rewrite that has begun is finished
_store = click.option("--store", type=folder, help="Where tuned records are kept.")
_fingerprint = click.argument("fingerprint", required=False)
_NO_TIME = "-"


@click.group(
    "logs",
    cls=Commands,
    invoke_without_command=True,
    short_help="Look at tuned records and look after them.",
    help="The tuning store: what was measured, for what, and by whom. Every command has --json, for scripts.",
)
@click.pass_context
def command(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command("list", help="One line for each target that has records.")
@_store
@common
def list_command(as_json: bool, store: Path | None) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.logs import listing

    found = listing(store)
    console.object(found)
    if not found["fingerprints"]:
        console.line(f"no tuned records in {found['store']}, and none are shipped: 'saevit-tvm tune' makes some")
        return
    console.table(
        ["records for", "whose", "trials", "valid", "kernels", "size", "last", "predicted"],
        [
            [
                row["fingerprint"],
                row["origin"],
                str(row["trials"]),
                str(row["valid"]),
                str(row["kernels"]),
                _size(row["bytes"]),
                row["last"] or _NO_TIME,
                "; ".join(map(_predicted, row["models"])) or _NO_TIME,
            ]
            for row in found["fingerprints"]
        ],
    )


@command.command("show", help="The kernels of one target: best time, trials, failures, and who measured.")
@_fingerprint
@click.option("--model", help="Only the kernels of this model.")
@_store
@common
def show_command(as_json: bool, store: Path | None, fingerprint: str | None, model: str | None) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.logs import show

    found = show(store, fingerprint, model)
    console.object(found)
    what = "modelled, not measured" if found["modelled"] else "measured"
    console.line(f"{found['fingerprint']} ({found['origin']}, {what}): {found['path']}")
    for row in found["models"]:
        console.line(f"  {_predicted(row)}, {row['tuned']} of {row['kernels']} kernels have a time")
    for machine in found["machines"]:
        console.line(f"  {machine['trials']} trials by {_machine(machine)}")
    console.table(
        ["kernel", "calls", "best ms", "trials", "valid", "failures", "best measured"],
        [
            [
                row["name"],
                str(row["calls"] or _NO_TIME),
                _NO_TIME if row["best_ms"] is None else f"{row['best_ms']:.4f}",
                str(row["trials"]),
                str(row["valid"]),
                ", ".join(f"{kind} {count}" for kind, count in row["failures"].items()) or _NO_TIME,
                f"{row['best']['time']} tvm {row['best']['versions']['tvm']}" if row["best"] else _NO_TIME,
            ]
            for row in found["kernels"]
        ],
    )


@command.command("check", help="Read every record and replay every trace; exit status 1 if something is damaged.")
@_fingerprint
@click.option("--repair", is_flag=True, help="Cut off a torn end, and put lines that are no records aside.")
@_store
@common
@click.pass_obj
def check_command(guard: Guard, as_json: bool, store: Path | None, fingerprint: str | None, repair: bool) -> int:
    console = Console(as_json)
    from saevit_tvm.verbs.logs import check

    guard.patience = _PATIENCE
    result = check(store, fingerprint, repair=repair, say=console.say)
    console.object(result)
    for row in result["fingerprints"]:
        for line in _verdict(row):
            console.line(f"{row['fingerprint']}: {line}")
    return int(result["damaged"] and not repair)


@command.command("merge", help="Put what other stores have into one: their whole history, nothing twice.")
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--into", required=True, type=folder, help="The store that takes it; made if it is not there.")
@click.option("--best", type=click.IntRange(1), metavar="K", help="Only the K fastest trials of each kernel.")
@common
def merge_command(as_json: bool, sources: tuple[Path, ...], into: Path, best: int | None) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.logs import merge

    result = merge(list(sources), into, best)
    console.object(result)
    for row in result["fingerprints"]:
        console.line(
            f"{row['fingerprint']}: {row['added']} trials added, {row['trials']} in all ({_size(row['bytes'])})"
        )


@command.command("prune", help="Keep the fastest trials of each kernel, and of the others only that they were made.")
@_fingerprint
@click.option("--best", type=click.IntRange(1), default=8, show_default=True, metavar="K", help="How many to keep.")
@_store
@common
@click.pass_obj
def prune_command(guard: Guard, as_json: bool, store: Path | None, fingerprint: str | None, best: int) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.logs import prune

    guard.patience = _PATIENCE
    result = prune(store, fingerprint, best)
    console.object(result)
    for row in result["fingerprints"]:
        console.line(
            f"{row['fingerprint']}: {row['removed']} trials removed, {row['trials'] - row['pruned']} kept "
            f"({_size(row['bytes_before'])} before, {_size(row['bytes'])} now)"
        )


def _predicted(model: dict[str, Any]) -> str:
    shape = "x".join(map(str, model["input"]))
    time = "incomplete" if model["best_ms"] is None else f"{model['best_ms']:.3f} ms"
    return " ".join(filter(None, [model["name"], shape, time]))


def _machine(machine: dict[str, Any]) -> str:
    facts = {key: value for key, value in machine.items() if key != "trials"}
    return ", ".join(f"{value} cores" if key == "cores" else str(value) for key, value in facts.items())


def _verdict(row: dict[str, Any]) -> list[str]:
    """What was found, and what `--repair` does or would do about it."""
    faults = [
        (row["torn_bytes"], "bytes of an unfinished record at the end"),
        (row["broken_lines"], "lines with a wrong checksum"),
        (row["unreadable"], "records that this version cannot read"),
        (row["orphans"], "trials of a kernel that is not there"),
    ]
    lines = [f"{count} {what}" for count, what in faults if count]
    if row["set_aside"] is not None:
        lines.append(f"repaired: {row['set_aside']} lines are now in {row['aside']}")
    elif row["damaged"]:
        lines.append(f"--repair would cut off the end and move the lines to {row['aside']}")
    else:
        lines.append(f"{row['trials']} trials of {row['kernels']} kernels, undamaged")
    if row["outdated_trials"]:
        lines.append(f"{row['outdated_trials']} trials do not apply to this version's kernels and are passed over")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
