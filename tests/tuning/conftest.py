"""A small kernel, and a store that holds a real search of it."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saevit_tvm import targets
from saevit_tvm.targets import Target
from saevit_tvm.tuning.store import Store

SEARCH = Path(__file__).with_name("search.py")
TRIALS = 10


@pytest.fixture(scope="session")
def matmul() -> Callable:
    return runpy.run_path(str(SEARCH))["matmul"]


@pytest.fixture(scope="session")
def target() -> Target:
    return targets.native()


@pytest.fixture(scope="session")
def searched_root(tmp_path_factory: pytest.TempPathFactory, matmul: Callable, target: Target) -> Path:
    """A store with the trials of one short search; tests that change it take `root`."""
    from saevit_tvm.tuning.session import Session

    root = tmp_path_factory.mktemp("searched")
    result = Session([matmul()], target, Store(root, target), model="test").run(trials=TRIALS)
    assert result.trials == TRIALS
    return root


@pytest.fixture
def root(tmp_path: Path, searched_root: Path) -> Path:
    return Path(shutil.copytree(searched_root, tmp_path / "store"))
