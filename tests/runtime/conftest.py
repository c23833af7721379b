"""A small real library, built once: `relu(x) @ weights` with parallel and vector loops, and its relatives."""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saevit_tvm.runtime import artifact


@dataclass(frozen=True)
class Sample:
    """A sealed artifact, what it was sealed from, and what it must compute."""

    path: Path
    library: Path
    manifest: dict[str, Any]
    weights: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.manifest["inputs"][0]["shape"])

    def input(self, seed: int) -> np.ndarray:
        return np.random.RandomState(seed).standard_normal(self.shape).astype(np.float32)

    def answer(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0) @ self.weights


def compile_sample(path: Path, weights: np.ndarray, rows: int, handing: bool) -> None:
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, rows, len(weights)), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            constant = relax.const(weights)
            y = builder.emit(relax.op.matmul(builder.emit(relax.op.nn.relu(x)), constant))
            if handing:
                flat = builder.emit(relax.op.reshape(x, (rows, len(weights))))
                y = relax.Tuple([y, x, flat, constant])
            result = builder.emit_output(y)
        builder.emit_func_output(result)
    schedule = tvm.s_tir.Schedule(relax.transform.LegalizeOps()(builder.get()))
    for name, function in schedule.mod.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc):
            schedule.work_on(name.name_hint)
            for block in schedule.get_child_blocks(schedule.get_sblock("root")):
                loops = schedule.get_loops(block)
                schedule.parallel(loops[1])
                if name.name_hint == "relu":  # reads its input sixteen bytes at a time, and faults unless aligned
                    schedule.vectorize(schedule.split(loops[-1], [None, 16])[1])
    tvm.compile(schedule.mod, target=tvm.target.Target({"kind": "llvm"})).export_library(str(path))


def describe(weights: np.ndarray, rows: int, handing: bool) -> dict[str, Any]:
    def tensor(name: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "shape": list(shape), "dtype": "float32"}

    inner, outer = weights.shape
    outputs = [tensor("y", 1, rows, outer)]
    if handing:
        outputs += [tensor("x", 1, rows, inner), tensor("flat", rows, inner), tensor("weights", inner, outer)]
    return {
        "model": "sample",
        "recipe": {"model": "sample"},
        "weights": {"source": "random", "seed": 0},
        "weights_digest": f"sha256:{hashlib.sha256(weights.tobytes()).hexdigest()}",
        "inputs": [tensor("x", 1, rows, inner)],
        "outputs": outputs,
        "preprocessing": {},
        "labels": None,
        "target": {"name": "native", "tvm": {"kind": "llvm"}, "arch": platform.machine(), "features": []},
        "dtype": "float32",
        "versions": artifact.installed_versions(),
        "records_digest": None,
        "regions": {},
        "kernels": {"total": 1, "tuned": 0, "scheduled": 0, "fallback": 1},
        "work": {"multiply_adds": rows * inner * outer, "left_to_rules": 0, "kernels_left": {}},
        "verification": {"passed": True, "max_abs_error": 0.0, "max_rel_error": 0.0, "proof": "host"},
        "reference": None,
    }


def make_sample(folder: Path, *, seed: int, inner: int, rows: int, handing: bool = False) -> Sample:
    weights = np.random.RandomState(seed).standard_normal((inner, inner)).astype(np.float32)
    library, path = folder / f"bare{seed}.so", folder / f"sample{seed}.so"
    compile_sample(library, weights, rows, handing)
    artifact.seal(library, describe(weights, rows, handing), path)
    return Sample(path, library, artifact.read_manifest(path), weights)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return make_sample(tmp_path_factory.mktemp("sample"), seed=1, inner=64, rows=16)


@pytest.fixture(scope="session")
def other_sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """The same functions under the same names, with other weights and another size."""
    return make_sample(tmp_path_factory.mktemp("other"), seed=2, inner=32, rows=8)


@pytest.fixture(scope="session")
def handing_sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Hands through more than its result: the input, the input in another shape, and a constant."""
    return make_sample(tmp_path_factory.mktemp("handing"), seed=3, inner=64, rows=16, handing=True)


@pytest.fixture(scope="session")
def long_sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Computes for a good fraction of a second."""
    return make_sample(tmp_path_factory.mktemp("long"), seed=4, inner=768, rows=768)


def forge(library: bytes, text: bytes) -> bytes:
    """An artifact by the letter of its documentation, with any manifest."""
    digest = hashlib.sha256(library + text).digest()
    return library + text + digest + struct.pack("<Q", len(text)) + b"SAEVIT1\n"


@pytest.fixture(scope="session")
def forged(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """forged(changed={...}, code=...) -> path of an artifact whose manifest or library was exchanged."""
    folder = tmp_path_factory.mktemp("forged")

    def build(changed: dict[str, Any] | None = None, code: bytes | None = None) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.so"
        text = json.dumps({**sample.manifest, **(changed or {})}).encode()
        path.write_bytes(forge(sample.library.read_bytes() if code is None else code, text))
        return path

    return build


@pytest.fixture(scope="session")
def forge_bytes() -> Any:
    return forge
