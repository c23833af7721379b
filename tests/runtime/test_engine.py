"""An engine gives right answers, to anybody who asks, and owns nothing of what it gives."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import saevit_tvm
from saevit_tvm.support.errors import ArtifactError, UsageError

TOLERANCE: Any = {"rtol": 1e-5, "atol": 1e-4}


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def aligned(x: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy that begins `offset` bytes after a multiple of 64."""
    memory = np.empty(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    placed = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    placed[...] = x
    return placed


@pytest.fixture(scope="module")
def engine(sample: Any) -> Any:
    return saevit_tvm.load(sample.path)


# Answers ----------------------------------------------------------------------


def test_numpy_in_numpy_out(sample: Any, engine: Any) -> None:
    x = sample.input(0)
    y = engine(x)
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, sample.answer(x), **TOLERANCE)


def test_torch_in_torch_out(sample: Any, engine: Any) -> None:
    x = sample.input(1)
    y = engine(torch.from_numpy(x).requires_grad_())
    assert isinstance(y, torch.Tensor)
    assert not y.requires_grad
    np.testing.assert_allclose(y.numpy(), sample.answer(x), **TOLERANCE)


@pytest.mark.parametrize("offset", [0, 4, 16, 32, 60])
def test_any_alignment(sample: Any, engine: Any, offset: int) -> None:
    x = aligned(sample.input(2), offset)
    assert x.ctypes.data % 64 == offset
    np.testing.assert_allclose(engine(x), sample.answer(x), **TOLERANCE)


def test_any_layout(sample: Any, engine: Any) -> None:
    base = aligned(sample.input(3))
    strided = aligned(np.repeat(base, 2, axis=2))[:, :, ::2]
    transposed = aligned(np.ascontiguousarray(base.T)).T
    backwards = aligned(np.ascontiguousarray(base[:, ::-1]))[:, ::-1]
    repeated = np.broadcast_to(base[:, :1], base.shape)
    readonly = base.copy()
    readonly.flags.writeable = False
    for x in (strided, transposed, backwards, repeated, readonly, torch.from_numpy(base.T.copy()).T):
        np.testing.assert_allclose(engine(x), sample.answer(np.asarray(x)), **TOLERANCE)
    assert not any(x.flags.c_contiguous for x in (strided, transposed, backwards, repeated))


def test_describes_itself(sample: Any, engine: Any) -> None:
    assert engine.manifest == sample.manifest
    assert [spec[:3] for spec in engine.inputs] == [("x", (1, 16, 64), "float32")]
    assert engine.outputs[0].shape == (1, 16, 64)
    assert "sample" in repr(engine)


def test_several_outputs_are_a_tuple(handing_sample: Any) -> None:
    x = handing_sample.input(4)
    outputs = saevit_tvm.load(handing_sample.path)(x)
    assert type(outputs) is tuple
    wanted_outputs = (handing_sample.answer(x), x, x[0], handing_sample.weights)
    for output, wanted in zip(outputs, wanted_outputs, strict=True):
        np.testing.assert_allclose(output, wanted, **TOLERANCE)


# Refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (np.zeros((1, 16, 32), np.float32), "shape (1, 16, 32), dtype float32, on cpu"),
        (np.zeros((16, 64), np.float32), "shape (16, 64)"),
        (np.zeros((1, 16, 64)), "dtype float64"),
        (np.zeros((1, 16, 64), ">f4"), "dtype >f4"),
        (np.zeros((1, 16, 64), bool), "dtype bool"),
        (torch.zeros(1, 16, 64, dtype=torch.bfloat16), "dtype bfloat16"),
        (torch.zeros(1, 16, 64, device="meta"), "on meta"),
        (torch.zeros(2, 16, 64), "shape (2, 16, 64)"),
        (torch.zeros(1, 16, 64).to_sparse(), "on cpu with layout torch.sparse_coo"),
    ],
)
def test_what_came_and_what_is_wanted(engine: Any, x: Any, came: str) -> None:
    with pytest.raises(ValueError, match="must have") as error:
        engine(x)
    assert came in str(error.value)
    assert "shape (1, 16, 64), dtype float32, on cpu" in str(error.value)


@pytest.mark.parametrize("x", [[1.0, 2.0], None, 3.0, "picture.jpg"])
def test_neither_numpy_nor_torch(engine: Any, x: Any) -> None:
    with pytest.raises(TypeError, match="give a NumPy array or a PyTorch tensor"):
        engine(x)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_neither_pickled_nor_copied(engine: Any, duplicate: Any) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        duplicate(engine)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_impossible_threads(sample: Any, threads: int) -> None:
    with pytest.raises(UsageError, match="give a number from 1"):
        saevit_tvm.load(sample.path, threads=threads)


def test_manifest_that_lies_about_the_shape(sample: Any, forged: Any) -> None:
    """The library itself notices, and the engine says so and lives."""
    liar = saevit_tvm.load(forged({"inputs": [{"name": "x", "shape": [1, 16, 63], "dtype": "float32"}]}))
    for _ in range(2):
        with pytest.raises(ArtifactError, match="TVM's runtime failed"):
            liar(np.zeros((1, 16, 63), np.float32))


# Ownership --------------------------------------------------------------------


def test_outputs_belong_to_the_caller(sample: Any) -> None:
    engine = saevit_tvm.load(sample.path)
    inputs = [aligned(sample.input(seed)) for seed in range(20)]
    outputs = [engine(x) for x in inputs]
    for x, y in zip(inputs, outputs, strict=True):
        np.testing.assert_allclose(y, sample.answer(x), **TOLERANCE)
        y.fill(np.nan)
    np.testing.assert_allclose(engine(inputs[0]), sample.answer(inputs[0]), **TOLERANCE)


def test_outputs_survive_the_engine(sample: Any) -> None:
    x = sample.input(5)
    engine = saevit_tvm.load(sample.path)
    y = engine(x)
    del engine
    gc.collect()
    saevit_tvm.load(sample.path)(sample.input(6))
    np.testing.assert_allclose(y, sample.answer(x), **TOLERANCE)


@pytest.mark.parametrize("offset", [0, 4])
def test_handed_through_outputs_are_copies(handing_sample: Any, offset: int) -> None:
    """An output that is the input, or a weight, must not let the caller write into either."""
    engine = saevit_tvm.load(handing_sample.path)
    x = aligned(handing_sample.input(7), offset)
    before = x.copy()
    _, same, flat, weights = engine(x)
    same.fill(0)
    flat.fill(0)
    weights.fill(0)
    np.testing.assert_array_equal(x, before)
    y, same, flat, weights = engine(x)
    x.fill(9)
    np.testing.assert_array_equal(same, before)
    np.testing.assert_array_equal(flat, before[0])
    np.testing.assert_array_equal(weights, handing_sample.weights)
    np.testing.assert_allclose(y, handing_sample.answer(before), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_ten_thousand_calls_leak_nothing(handing_sample: Any, offset: int, convert: Any) -> None:
    engine = saevit_tvm.load(handing_sample.path, threads=2 if offset else 1)
    x = convert(aligned(handing_sample.input(8), offset))
    for _ in range(500):
        engine(x)
    before = resident()
    for _ in range(2_500):  # of each of four kinds
        engine(x)
    # One output is 4 KiB: keeping any of them would be 10 MiB.
    assert resident() - before < 1 << 19


@pytest.mark.slow
def test_failing_calls_leak_nothing(forged: Any) -> None:
    liar = saevit_tvm.load(forged({"inputs": [{"name": "x", "shape": [1, 999, 64], "dtype": "float32"}]}))
    x = np.zeros((1, 999, 64), np.float32)

    def fail(times: int) -> None:
        for _ in range(times):
            with pytest.raises(ArtifactError):
                liar(x)

    fail(100)
    before = resident()
    fail(2000)
    assert resident() - before < 4 << 20


def tasks() -> set[str]:
    """The operating system's threads of this process."""
    return {thread.name for thread in Path("/proc/self/task").iterdir()}


@pytest.mark.slow
def test_loading_and_dropping_leaks_nothing(sample: Any, other_sample: Any) -> None:
    def load_all() -> None:
        for each in (sample, other_sample):
            x = each.input(9)
            engine = saevit_tvm.load(each.path, threads=1)
            np.testing.assert_allclose(engine(x), each.answer(x), **TOLERANCE)

    for _ in range(50):
        load_all()
    before = resident()
    for _ in range(200):
        load_all()
    assert resident() - before < 2 << 20


@pytest.mark.slow
def test_threads_of_dropped_engines_end(sample: Any) -> None:
    before = len(tasks())
    for _ in range(5):
        saevit_tvm.load(sample.path, threads=3)(sample.input(0))
    deadline = time.monotonic() + 30  # TVM's threads spin for a while before they notice
    while len(tasks()) > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.1)
    assert len(tasks()) <= before


# Many at once -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_callers_on_one_engine(sample: Any, threads: int) -> None:
    engine = saevit_tvm.load(sample.path, threads=threads)

    def caller(seed: int) -> None:
        for step in range(100):
            x = aligned(sample.input(1000 * seed + step), 0 if step % 2 else 4)
            np.testing.assert_allclose(engine(x), sample.answer(x), **TOLERANCE)

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(caller, range(8)))


@pytest.mark.slow
def test_weights_are_not_duplicated_per_worker(
    tmp_path: Path, long_sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many workers on one engine cost far less than their number times the weights (2.25 MiB)."""
    monkeypatch.setattr("saevit_tvm.runtime.engine._physical_cores", lambda: 16)
    engine = saevit_tvm.load(long_sample.path, threads=1)
    x = long_sample.input(0)
    gate = threading.Barrier(16)

    def open_machine() -> Any:
        gate.wait(timeout=60)  # holds until all sixteen workers are here
        return engine._machines.mine()

    before = resident()
    machines = [future.result() for future in [engine._workers.submit(open_machine) for _ in range(16)]]
    assert len(set(map(id, machines))) == 16
    # Each has a staging buffer for the input, as large as the weights here, and nothing else of that size.
    assert resident() - before < 16 * (x.nbytes + (1 << 19))


def test_two_artifacts_in_one_process(sample: Any, other_sample: Any) -> None:
    """Both libraries export the same names."""
    engines = [(each, saevit_tvm.load(each.path)) for each in (sample, other_sample, sample)]
    for seed in range(50):
        for each, engine in engines:
            x = each.input(seed)
            np.testing.assert_allclose(engine(x), each.answer(x), **TOLERANCE)


def test_same_file_twice_shares_the_weights(long_sample: Any, tmp_path: Path) -> None:
    copies = [tmp_path / "a.so", tmp_path / "b.so"]
    for path in copies:
        shutil.copy(long_sample.path, path)
    engines = [saevit_tvm.load(path, threads=1) for path in (copies[0], copies[0], copies[1])]
    assert engines[0]._machines._library is engines[1]._machines._library
    assert engines[0]._machines._library is not engines[2]._machines._library


def test_deleted_and_replaced_files(sample: Any, other_sample: Any, tmp_path: Path) -> None:
    path, newer = tmp_path / "model.so", tmp_path / "newer.so"
    shutil.copy(sample.path, path)
    first = saevit_tvm.load(path)
    path.unlink()
    x = sample.input(10)
    np.testing.assert_allclose(first(x), sample.answer(x), **TOLERANCE)
    shutil.copy(other_sample.path, newer)
    newer.replace(path)
    second = saevit_tvm.load(path)
    z = other_sample.input(10)
    np.testing.assert_allclose(second(z), other_sample.answer(z), **TOLERANCE)
    np.testing.assert_allclose(first(x), sample.answer(x), **TOLERANCE)


@pytest.mark.parametrize("name", ["model", "model.saevit", "mödel with spaces.so"])
def test_any_file_name(sample: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(sample.path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    x = sample.input(11)
    np.testing.assert_allclose(saevit_tvm.load(name)(x), sample.answer(x), **TOLERANCE)


# Threads ----------------------------------------------------------------------


def test_default_threads(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert saevit_tvm.load(sample.path).threads == 3
    monkeypatch.setenv("TVM_NUM_THREADS", "zero")
    assert 1 <= saevit_tvm.load(sample.path).threads <= len(os.sched_getaffinity(0))


def test_each_engine_has_its_own_number_of_threads(sample: Any) -> None:
    gc.collect()  # threads of other tests' engines may end at any time later; only those that begin are counted
    engines, counts = [], []
    for threads in (1, 2, 5):
        before = tasks()
        engines.append(saevit_tvm.load(sample.path, threads=threads))
        engines[-1](sample.input(0))
        counts.append(len(tasks() - before))
    assert counts == [1, 2, 5]


def test_no_thread_is_bound_to_a_core(sample: Any) -> None:
    """TVM would bind the thread that calls it, and its pool, to the first cores; all engines to the same."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) == 1:
        pytest.skip("one core shows nothing")
    engine = saevit_tvm.load(sample.path, threads=1)
    engine(sample.input(0))
    assert os.sched_getaffinity(0) == allowed
    assert engine._workers.submit(os.sched_getaffinity, 0).result() == allowed


def test_ctrl_c_while_computing(long_sample: Any) -> None:
    engine = saevit_tvm.load(long_sample.path, threads=1)
    x = long_sample.input(0)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in range(1000):
                engine(x)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    np.testing.assert_allclose(engine(x), long_sample.answer(x), rtol=1e-4, atol=1e-2)
