"""What a command writes: its results on stdout, its progress on stderr, and nothing else on either.

Libraries print what they like, much of it from C++ and meant for their programmers. So while a command works,
descriptors 1 and 2 lead nowhere (with --debug: to stderr), and only the console holds the real ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from saevit_tvm.cli.guard import CLEAR, Guard
from saevit_tvm.support import progress

EVERY_SECONDS = 10.0  # a line of progress where it is not a terminal that is written to


class Console:
    """Tables on a terminal, plain aligned text elsewhere, one object with `as_json`."""

    def __init__(self, as_json: bool = False) -> None:
        guard = click.get_current_context().find_object(Guard)
        assert guard is not None
        self.as_json = as_json
        sys.stdout.flush()
        sys.stderr.flush()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        self.err = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self.terminal = self._out.isatty()
        noise = guard.stderr if guard.debug else os.open(os.devnull, os.O_WRONLY)
        os.dup2(noise, 1)
        os.dup2(noise, 2)
        self._live, self._said = "", time.monotonic()
        progress.watch(self._now)

    def say(self, text: str) -> None:
        """Progress: a line on stderr."""
        self._clear()
        self.err.write(text + "\n")
        self.err.flush()

    def _now(self, text: str) -> None:
        """A line that the next one overwrites; where none can be, now and then one that stays."""
        if self.err.isatty():
            self._live = CLEAR
            self.err.write(f"{CLEAR}{text}\r")
            self.err.flush()
        elif time.monotonic() - self._said >= EVERY_SECONDS:
            self._said = time.monotonic()
            self.say(text)

    def _clear(self) -> None:
        self.err.write(self._live)
        self.err.flush()
        self._live = ""

    def line(self, text: str = "") -> None:
        """A line of the result."""
        if not self.as_json:
            self._write(text)

    def object(self, value: dict[str, Any]) -> None:
        """The result for scripts."""
        if self.as_json:
            self._write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table of the result; columns whose cells are numbers are aligned to the right."""
        if self.as_json:
            return
        self._clear()
        right = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
        if self.terminal:
            self._rich_table(columns, rows, right, title)
            return
        if title:
            self._write(title)
        lines = [columns, *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
            self._write("  ".join(cells).rstrip())

    def _rich_table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], title: str
    ) -> None:
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
        for column, to_right in zip(columns, right, strict=True):
            table.add_column(column, justify="right" if to_right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        RichConsole(file=self._out).print(table)
        self._out.flush()

    def _write(self, text: str) -> None:
        self._clear()
        self._out.write(text + "\n")
        self._out.flush()


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.rstrip("x%").replace(".", "", 1).replace("e-", "", 1).isdigit()


def flipped(proof: dict[str, Any]) -> str:
    """How many whole numbers among the answers are others, where there are some."""
    return f"; {proof['flipped']} of {proof['decisions']} decisions flipped" if "decisions" in proof else ""
