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


def started(script: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, timeout=1800, **options)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a process of its own, its results in the test's folder, or in a file there."""
    return lambda name, *args, out=".": started(BENCHMARKS / name, *args, "--out", str(tmp_path / out), cwd=tmp_path)


@pytest.fixture(scope="session")
def short(made_once: Callable[..., Path]) -> Callable[[str], tuple[subprocess.CompletedProcess[str], Path]]:
    """A script's short form, run once: its process, and the folder of its results."""

    def run(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        def make(folder: Path) -> None:
            out = folder / "out"
            out.mkdir()
            done = started(BENCHMARKS / f"{name}.py", "--short", "--out", str(out), cwd=out)
            said = {"args": name, "returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
            (folder / "done.json").write_text(json.dumps(said))

        folder = made_once(f"short-{name}", make)
        return subprocess.CompletedProcess(**json.loads((folder / "done.json").read_text())), folder / "out"

    return run


@pytest.fixture
def packed_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs what `cuda.py prepare` packed by itself, without this package on the way."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return lambda folder, *args: started(folder / "bench.py", *args, cwd=folder, env=environment)
