"""The group of commands, and the one sentence for whatever click itself finds wrong."""

from __future__ import annotations

import sys
from typing import Any

import click

from saevit_tvm.cli.guard import Guard
from saevit_tvm.cli.options import Commands
from saevit_tvm.support.errors import UsageError, unknown
from saevit_tvm.support.version import __version__

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Commands, context_settings=SETTINGS, invoke_without_command=True)
@click.version_option(__version__, prog_name="saevit-tvm", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Build one tuned, verified, self-describing .so from a PyTorch vision model, check it and run it."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def invoke(arguments: list[str], guard: Guard) -> int:
    """Run one command line; the exit status."""
    _register()
    # --debug counts wherever it stands, and before anything of the line is parsed.
    guard.debug = "--debug" in arguments
    try:
        with app.make_context("saevit-tvm", list(arguments), obj=guard) as context:
            status = app.invoke(context)
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        raise _as_sentence(error) from error
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


# Wrong usage ------------------------------------------------------------


def _as_sentence(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "saevit-tvm"
    if isinstance(error, click.NoSuchCommand):
        group = context.command if context and isinstance(context.command, click.Group) else app
        return unknown("command", error.command_name, group.commands)
    if isinstance(error, click.NoSuchOption) and context:
        options = [
            name for parameter in context.command.get_params(context) for name in parameter.opts if name[0] == "-"
        ]
        return unknown("option", error.option_name, options)
    return UsageError(f"{error.format_message().rstrip('.')}: see '{where} --help'.")


def _register() -> None:
    from saevit_tvm.cli import bench, build, doctor, logs, models, rpc_server, run, sdk, targets, tune, verify

    for module in (models, targets, tune, build, verify, bench, run, sdk, logs, rpc_server, doctor):
        app.add_command(module.command)
