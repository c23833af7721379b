"""The runtime with a real model: the smallest SAEViT, against PyTorch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import saevit_tvm


@pytest.fixture(scope="module")
def source() -> Any:
    from saevit_tvm.models.opening import open_model

    return open_model("saevit_micro", image_size=64)


def picture(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((1, 3, 64, 64)).astype(np.float32)


def test_sealed_file_and_sidecar(micro_artifact: Path) -> None:
    from saevit_tvm.runtime.artifact import read_manifest

    content, text = micro_artifact.read_bytes(), micro_artifact.with_suffix(".json").read_bytes()
    manifest = read_manifest(micro_artifact)
    assert content[manifest["size"] :].startswith(text)
    assert manifest["verification"]["passed"] is True


@pytest.mark.parametrize("threads", [1, 2])
def test_many_threads_agree_with_pytorch(micro_artifact: Path, source: Any, threads: int) -> None:
    inputs = [picture(seed) for seed in range(16)]
    wanted = [source.reference(x)[0] for x in inputs]
    engine = saevit_tvm.load(micro_artifact, threads=threads)
    with ThreadPoolExecutor(8) as callers:
        for outputs in zip(*(callers.map(engine, inputs) for _ in range(10)), strict=True):
            for output in outputs:
                assert output.shape == (1, 1000)
        for output, reference in zip(callers.map(engine, inputs), wanted, strict=True):
            assert np.abs(output - reference).max() < 1e-5 * max(1, np.abs(reference).max())


@pytest.mark.slow
def test_ten_thousand_inferences_leak_nothing(micro_artifact: Path) -> None:
    x, process = picture(0), psutil.Process()
    engines = [saevit_tvm.load(micro_artifact, threads=threads) for threads in (1, 2)]
    for engine in engines:
        for _ in range(500):
            engine(x)
    before = process.memory_info().rss
    for engine, times in zip(engines, (8_000, 2_000), strict=True):
        for _ in range(times):
            engine(x)
    assert process.memory_info().rss - before < 2 << 20
