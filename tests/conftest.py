"""What many tests share: one small model compiled once, and the command line as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_tuning_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the records of whoever runs it."""
    os.environ["SAEVIT_TVM_STORE"] = str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def micro_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model at 64x64, built and verified for this machine."""
    from saevit_tvm.verbs.build import BuildOptions, build

    options = BuildOptions(model="saevit_micro", image_size=64, out=tmp_path_factory.mktemp("micro"))
    return build(options, say=lambda _line: None).artifact


@pytest.fixture(scope="session")
def rpi5_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for a Raspberry Pi 5, verified under qemu."""
    from saevit_tvm.verbs.build import BuildOptions, build

    options = BuildOptions(model="saevit_micro", target="rpi5", image_size=64, out=tmp_path_factory.mktemp("rpi5"))
    return build(options, say=lambda _line: None).artifact


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""

    def run(*args: str | Path, timeout: float = 600, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "saevit_tvm", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)

    return run
