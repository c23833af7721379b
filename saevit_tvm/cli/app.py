"""The group of commands, and the one sentence for whatever click itself finds wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from saevit_tvm import __version__
from saevit_tvm.cli.guard import Guard
from saevit_tvm.errors import UsageError, unknown

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Commands(click.Group):
    """Commands in the order in which they are used, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


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


# Options that commands share ------------------------------------------

folder = click.Path(path_type=Path)
file = click.Path(exists=True, dir_okay=False, path_type=Path)
artifact_argument = click.argument("artifact", type=file)
target_option = click.option(
    "--target", default="native", show_default=True, help="A name that 'targets' lists, or TVM's target JSON."
)
cut_option = click.option(
    "--threads", type=click.IntRange(1, 256), help="Cut the work for so many threads; by default for all cores."
)
dtype_option = click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="What it computes in: float32, or where the target can ('targets' lists them) tf32, float16 or bfloat16.",
)
_MODEL_OPTIONS = (
    click.option(
        "--model",
        default="saevit_xs",
        show_default=True,
        help="A built-in name, timm:NAME, or a .pt2 or .onnx file.",
    ),
    click.option("--weights", help="A .safetensors or .pt file, or the name of a shipped checkpoint."),
    click.option("--batch", type=int, default=1, show_default=True, help="Pictures at a time."),
    click.option("--image-size", type=int, help="Height and width of the input."),
)
_COMMON_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a model is made of."""
    return _apply(_MODEL_OPTIONS, command)


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options every command has."""
    return _apply(_COMMON_OPTIONS, command)


def _apply(options: tuple[Callable[..., Any], ...], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


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
