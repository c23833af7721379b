"""What the benchmarks of the ARM boards share: their options, and results that are written down as they come."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def parser(
    description: str | None, models: Sequence[str], target: str, against: Sequence[str]
) -> argparse.ArgumentParser:
    def chosen(text: str) -> list[str]:
        names = text.split(",") if text else []
        if unknown := [name for name in names if name not in against]:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]}; there are {', '.join(against)}")
        return names

    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", type=lambda text: text.split(","), default=list(models))
    made.add_argument("--target", default=target, help="one of saevit-tvm's ARM targets")
    made.add_argument("--image-size", type=int)
    made.add_argument("--against", type=chosen, default=list(against), help="other runtimes, by default all")
    return made


def gather(
    name: str,
    options: argparse.Namespace,
    measured: Callable[[str, argparse.Namespace, Path], Iterator[Row]],
    table: Callable[[list[Row]], str],
) -> None:
    """Every model's rows, in a JSON file and a table of this name; what is there is kept if a later one fails."""
    rows: list[Row] = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            for row in measured(model, options, Path(scratch)):
                rows.append({"model": model} | row)
                (options.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
                (options.out / f"{name}.md").write_text(table(rows))
    print(table(rows))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lined(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *body]) + "\n"
