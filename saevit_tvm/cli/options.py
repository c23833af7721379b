"""Options that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class ImageSize(click.ParamType):
    """One number, or height and width."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        found = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", str(value))
        if not found:
            self.fail(f"'{value}' is not a size: give one number, or height and width as in 480x640.", param, ctx)
        height, width = found.groups()
        return int(height) if width is None else (int(height), int(width))


class Batches(click.ParamType):
    """A number of pictures, or several."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        if not re.fullmatch(r"-?\d{1,9}(,\d{1,9})*", str(value)):
            self.fail(f"'{value}' is no number of pictures: give one, or several as in 1,4,16.", param, ctx)
        numbers = tuple(map(int, str(value).split(",")))
        return numbers[0] if len(numbers) == 1 else numbers


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
    click.option("--pretrained", is_flag=True, help="Trained weights of a timm:NAME, from its hub or a cache of that."),
    click.option(
        "--batch", type=Batches(), default=1, show_default=True, help="Pictures at a time, as in 4 or 1,4,16."
    ),
    click.option("--image-size", type=ImageSize(), help="Of the input, as in 224 or 480x640 (height x width)."),
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


class Commands(click.Group):
    """Commands in the order in which they are used, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
