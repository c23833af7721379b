"""saevit-tvm tune: search for faster schedules and keep what was measured."""

from __future__ import annotations

from typing import Any

import click

from saevit_tvm.cli.app import common, folder, model_options, target_option
from saevit_tvm.cli.console import Console
from saevit_tvm.cli.guard import Guard

# A stop has to wait for the measurement that is under way.
PATIENCE = 20.0


@click.command(
    "tune",
    short_help="Search for faster schedules.",
    help="Search for faster schedules of a model's kernels; run it again to go on.",
)
@target_option
@model_options
@click.option("--trials", type=click.IntRange(1), help="How many candidates to measure.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="How long to search.")
@click.option("--store", type=folder, help="Where tuned records are kept.")
@common
@click.pass_obj
def command(guard: Guard, as_json: bool, **options: Any) -> None:
    console = Console(as_json)
    guard.patience, guard.kept = (
        PATIENCE,
        "what was measured is kept, and the same command goes on from there",
    )
    from saevit_tvm.verbs.tune import tune

    result = tune(**options, say=console.say, progress=None)
    console.object(result)
