"""Building a generated kernel, for this machine to run or for another to read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from saevit_tvm.targets import native
from schedules.machines.cpus import Isa, isa_of


def compile_for(func: Any, target: dict[str, Any]) -> Any:
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        return tvm.compile(tvm.IRModule({"kernel": func}), target=tvm.target.Target(target))


@pytest.fixture(scope="session")
def here() -> Isa:
    return isa_of(native().tvm)


@pytest.fixture(scope="session")
def call() -> Callable[..., np.ndarray]:
    """call(func, inputs, shape): the function's result on this machine; it starts as NaN, so gaps show."""
    compiled: dict[str, Any] = {}

    def run(func: Any, inputs: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        # TVM's structural hash is the same for loops that are not.
        key = hashlib.sha256(tvm.ir.save_json(func).encode()).hexdigest()
        if key not in compiled:
            compiled[key] = compile_for(func, native().tvm).jit()
        kernel = compiled[key][str(func.attrs["global_symbol"])]
        out = tvm.runtime.tensor(np.full(shape, np.nan, str(func.params[-1].dtype)))
        for _ in range(2):  # nothing may be left over from the first time
            kernel(*map(tvm.runtime.tensor, inputs), out)
        return out.numpy()

    return run


@pytest.fixture(scope="session")
def assembly() -> Callable[..., str]:
    return lambda func, target: str(compile_for(func, target).mod.inspect_source("asm"))


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where libraries for OpenCL and compiled kernels go."""
    folder = tmp_path_factory.mktemp("gpu")
    before = os.environ.get("SAEVIT_TVM_CACHE")
    os.environ["SAEVIT_TVM_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SAEVIT_TVM_CACHE")
    if before is not None:
        os.environ["SAEVIT_TVM_CACHE"] = before
