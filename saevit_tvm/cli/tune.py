"""saevit-tvm tune: search for faster schedules and keep what was measured."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from saevit_tvm.cli.app import common, cut_option, dtype_option, folder, model_options, target_option
from saevit_tvm.cli.console import Console
from saevit_tvm.cli.guard import Guard

SAVING_SECONDS = 5.0  # what a stop waits for besides the measurements under way


@click.command(
    "tune",
    short_help="Search for faster schedules.",
    help="Search for faster schedules of a model's kernels. The same command goes on where it stopped.",
)
@target_option
@cut_option
@model_options
@dtype_option
@click.option("--trials", type=click.IntRange(1), help="Measurements in all, those of earlier runs included.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="How long to search from now.")
@click.option("--store", type=folder, help="Where tuned records are kept.")
@click.option(
    "--measure",
    default="local",
    show_default=True,
    metavar="WHERE",
    help="local; rpc://HOST:PORT/KEY, boards behind a TVM tracker; or qemu, a model in place of time.",
)
@click.option("--cluster", metavar="ADDRESS", help="Spread over a Ray cluster: ray://HOST:PORT, or local:N.")
@common
@click.pass_obj
def command(guard: Guard, as_json: bool, **options: Any) -> None:
    console = Console(as_json)
    from saevit_tvm.tuning import measurers, progress
    from saevit_tvm.verbs import workspace
    from saevit_tvm.verbs.tune import tune

    guard.patience = measurers.longest_seconds(options["measure"], options["cluster"]) + SAVING_SECONDS
    guard.kept = "what was measured is kept, and the same command goes on from there"
    live = progress.live(console.err) if console.err.isatty() else contextlib.nullcontext()
    with workspace.scratch(), live as show:
        result = tune(**options, say=console.say, progress=show)
    console.object(result)
    console.line(
        f"{result['trials']} trials ({result['valid']} valid, {result['failed']} failed), "
        f"{result['tuned']} of {result['tasks']} kernels have a record; {_best(result)}"
    )
    console.line(f"records are in {result['store']}; 'saevit-tvm build' uses them")


def _best(result: dict[str, Any]) -> str:
    if result["best_ms"] is None:
        return "no prediction before each of them has one"
    kind = " by the emulator's model, which is no time" if result["measured"] == "modelled" else ""
    return f"{result['best_ms']:.3f} ms predicted{kind}"
