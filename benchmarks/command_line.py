"""What the command lines of all scripts share: the short form that CI runs, and where results go."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
STAND_IN = Path(__file__).parent / "stand_in"


def parsed(parser: argparse.ArgumentParser, short: str, *, kept: bool = True) -> argparse.Namespace:
    """The options, with --short those that it stands for; any may be given beside it and counts more."""
    parser.add_argument("--short", action="store_true", help=f"the least that takes every step, for CI: {short}")
    where = "in benchmarks/results, and with --short nowhere" if kept else "nowhere"
    parser.add_argument("--out", type=Path, help=f"folder for the results; by default {where}")
    options = parser.parse_args()
    if options.short:
        options = parser.parse_args([*short.split(), *sys.argv[1:]])
    if options.out is None:
        options.out = RESULTS if kept and not options.short else _nowhere()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def stand_in() -> list[str]:
    """A folder for Python's path: timm wants torchvision; where it is not installed, names are enough."""
    found = importlib.util.find_spec("torchvision")
    is_real = found is not None and STAND_IN not in Path(found.origin or "").parents
    return [] if is_real else [str(STAND_IN)]


def _nowhere() -> Path:
    """A folder that is gone when the script ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
