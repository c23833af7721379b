"""The scripts in `benchmarks/` are no package: they are imported as they find each other, side by side."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = 1800  # the longest that a script may take


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(forks: Any, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a process of its own, its results in the test's folder, or in a file there."""

    def started(name: str, *args: str, out: str = ".") -> subprocess.CompletedProcess[str]:
        told = ("--out", str(tmp_path / out))
        return forks.script(BENCHMARKS / name, *args, *told, timeout=SECONDS, cwd=tmp_path)

    return started


@pytest.fixture(scope="session")
def short(made_once: Callable[..., Path], forks: Any) -> Callable[[str], tuple[subprocess.CompletedProcess[str], Path]]:
    """A script's short form, run once: its process, and the folder of its results."""

    def run(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        def make(folder: Path) -> None:
            out = folder / "out"
            out.mkdir()
            script = BENCHMARKS / f"{name}.py"
            done = forks.script(script, "--short", "--out", str(out), timeout=SECONDS, cwd=out)
            said = {"args": name, "returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
            (folder / "done.json").write_text(json.dumps(said))

        folder = made_once(f"short-{name}", make)
        return subprocess.CompletedProcess(**json.loads((folder / "done.json").read_text())), folder / "out"

    return run


@pytest.fixture
def packed_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs what `gpu_slot.py prepare` packed by itself, without this package on the way."""

    def run(folder: Path, *args: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
        line = [sys.executable, str(folder / "gpu_slot.py"), *map(str, args)]
        return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=SECONDS, env=ours)

    return run
