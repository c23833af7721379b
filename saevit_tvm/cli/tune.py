"""saevit-tvm tune: search for faster schedules and keep what was measured."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.guard import Guard
from saevit_tvm.cli.options import common, cut_option, dtype_option, folder, model_options, target_option
from saevit_tvm.support.errors import UsageError

SAVING_SECONDS = 5.0  # what a stop waits for besides the measurements under way
SEARCH_ONLY = ("minutes", "measure", "cluster")


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
@click.option(
    "--export-candidates",
    type=folder,
    metavar="FILE.tar",
    help="Measure nothing: put --trials candidates into a file, with the program that measures them elsewhere.",
)
@click.option("--with-runtime", is_flag=True, help="Put TVM's runtime into that file, too.")
@click.option("--import-results", type=folder, metavar="FILE", help="Take over what that program measured.")
@common
@click.pass_context
def command(
    context: click.Context,
    as_json: bool,
    export_candidates: Path | None,
    with_runtime: bool,
    import_results: Path | None,
    **options: Any,
) -> None:
    console = Console(as_json)
    given = {name for name in context.params if _given(context, name)}
    if export_candidates is not None:
        _refuse("--export-candidates", given & {*SEARCH_ONLY, "import_results"})
        chosen = {name: value for name, value in options.items() if name not in SEARCH_ONLY}
        _export(console, export_candidates, with_runtime, chosen)
    elif with_runtime:
        raise UsageError("--with-runtime says what goes into a file: give --export-candidates FILE.tar, too.")
    elif import_results is not None:
        _refuse("--import-results", given - {"as_json", "import_results", "target", "store"})
        target = options["target"] if "target" in given else None
        _import(console, import_results, target, options["store"])
    else:
        guard = context.find_object(Guard)
        assert guard is not None
        _search(console, guard, options)


def _search(console: Console, guard: Guard, options: dict[str, Any]) -> None:
    from saevit_tvm.support import workspace
    from saevit_tvm.tuning import measurers, progress
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
    several = len(result["batches"]) > 1
    each = f" for one inference of each batch ({', '.join(map(str, result['batches']))})" if several else ""
    return f"{result['best_ms']:.3f} ms predicted{each}{kind}"


def _export(console: Console, path: Path, with_runtime: bool, options: dict[str, Any]) -> None:
    from saevit_tvm.verbs.tune import export_candidates

    result = export_candidates(path, with_runtime=with_runtime, say=console.say, **options)
    console.object(result)
    name = path.name.partition(".")[0]
    failed = f", {result['failed']} do not compile" if result["failed"] else ""
    what = f"{result['candidates']} candidates of {result['kernels']} kernels"
    console.line(f"{path}: {what}, {result['bytes'] / 1e6:.1f} MB{failed}")
    console.line(f"there: tar xf {path.name} && python3 {name}/run.py    (it goes on where it stopped)")
    console.line(f"back here: saevit-tvm tune --import-results {name}/results.jsonl")


def _import(console: Console, path: Path, target: str | None, store: Path | None) -> None:
    from saevit_tvm.verbs.tune import import_results

    result = import_results(path, target=target, store=store)
    if result["damaged"]:
        console.say(
            f"warning: {result['damaged']} lines of '{path}' were left out, because they are damaged or it is not "
            "known where they were measured: copy the file again, if it is whole where it comes from."
        )
    console.object(result)
    where = ", ".join(str(machine.get("device", machine["cpu"])) for machine in result["machines"]) or "nowhere yet"
    console.line(
        f"{result['new']} new trials for {result['target']}, {result['known']} known already "
        f"({result['valid']} valid, {result['failed']} failed), measured on {where}"
    )
    console.line(f"records are in {result['store']}; 'saevit-tvm build' uses them")


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _refuse(option: str, given: set[str]) -> None:
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise UsageError(f"{names} means nothing beside {option}: leave it out.")
