"""The scripts in `benchmarks/` are no package: they are imported as they find each other, side by side."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a process of its own, its results in the test's folder, or in a file there."""

    def call(name: str, *args: str, out: str = ".") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCHMARKS / name), *args, "--out", str(tmp_path / out)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)

    return call
