"""Building a generated kernel, for this machine to run or for another to read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm_ffi import structural_equal, structural_hash

from saevit_tvm.compiler import library
from saevit_tvm.targets import native
from schedules.machines.cpus import Isa, isa_of


def compile_for(func: Any, target: dict[str, Any]) -> Any:
    mod = tvm.IRModule({"kernel": func})
    with library.generating_code(mod):
        return tvm.compile(mod, target=tvm.target.Target(target))


@pytest.fixture(scope="session")
def here() -> Isa:
    return isa_of(native().tvm)


@pytest.fixture(scope="session")
def call() -> Callable[..., np.ndarray]:
    """call(func, inputs, shape): the function's result on this machine; it starts as NaN, so gaps show."""
    compiled: dict[int, list[tuple[Any, Any]]] = {}  # by TVM's hash, which is the same for some loops that are not

    def compiled_here(func: Any) -> Any:
        alike = compiled.setdefault(structural_hash(func), [])
        found = next((library for known, library in alike if structural_equal(known, func)), None)
        if found is None:
            found = compile_for(func, native().tvm).jit()
            alike.append((func, found))
        return found

    def run(func: Any, inputs: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        kernel = compiled_here(func)[str(func.attrs["global_symbol"])]
        out = tvm.runtime.tensor(np.full(shape, np.nan, str(func.params[-1].dtype)))
        for _ in range(2):  # nothing may be left over from the first time
            kernel(*map(tvm.runtime.tensor, inputs), out)
        return out.numpy()

    return run


@pytest.fixture(scope="session")
def assembly() -> Callable[..., str]:
    return lambda func, target: str(compile_for(func, target).mod.inspect_source("asm"))


@pytest.fixture(scope="package")
def folder(give_plugin: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where libraries for OpenCL and compiled kernels go."""
    folder = tmp_path_factory.mktemp("gpu")
    give_plugin(folder)
    before = os.environ.get("SAEVIT_TVM_CACHE")
    os.environ["SAEVIT_TVM_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SAEVIT_TVM_CACHE")
    if before is not None:
        os.environ["SAEVIT_TVM_CACHE"] = before
