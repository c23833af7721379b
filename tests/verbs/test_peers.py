"""Runtimes in processes of their own: a crash is a sentence, their answers are right, they end with us."""

from __future__ import annotations

import numpy as np
import pytest

from saevit_tvm.errors import UsageError
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.bench import Runtime, _convert
from saevit_tvm.verbs.peers.process import PeerError, PeerProcess
from saevit_tvm.verbs.roundtrip import RoundTrip


def test_an_unknown_runtime_points_at_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'openvino'"):
        peers.get("openvinno")


def serve(name, folder, tmp_path, threads=1):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    order = {"do": "serve", "peer": name, "folder": str(folder), "threads": threads}
    order |= {"example": str(tmp_path / "x.npy"), "outputs": str(tmp_path / "y.npz")}
    return PeerProcess(order, threads, work)


@pytest.fixture
def example(tmp_path):
    x = np.random.RandomState(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return x


@pytest.fixture
def model(tmp_path):
    """A plain network that every runtime can take."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(4, 5, 1))
    torch.save(module.eval(), tmp_path / "model.pt")
    return module


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino", "ncnn"])
def test_every_runtime_computes_what_pytorch_computes(name, example, model, tmp_path):
    import torch

    runtime = Runtime(peers.get(name), tmp_path / name)
    if runtime.peer.missing():
        pytest.skip(f"{name} is not installed")
    runtime.folder.mkdir()
    _convert(runtime, tmp_path / "model.pt", tmp_path / "x.npy")
    assert runtime.peer.size(runtime.folder) > 0
    with serve(name, runtime.folder, tmp_path) as process:
        assert process.reply()["first_ms"] > 0
        assert len(process.ask(warm=0, runs=3, seconds=0.0)["times"]) == 3
    (answer,) = np.load(tmp_path / "y.npz").values()
    with torch.no_grad():
        np.testing.assert_allclose(answer, model(torch.from_numpy(example)).numpy(), atol=1e-5)


def test_what_pnnx_leaves_unconverted_is_refused_and_not_run(tmp_path, example):
    import torch

    if peers.get("ncnn").missing():
        pytest.skip("ncnn is not installed")
    torch.save(torch.nn.Sequential(torch.nn.Unflatten(1, (1, 3)), torch.nn.Flatten(0, 1)), tmp_path / "model.pt")
    runtime = Runtime(peers.get("ncnn"), tmp_path / "ncnn")
    runtime.folder.mkdir()
    with pytest.raises(PeerError, match="pnnx could not convert"):
        _convert(runtime, tmp_path / "model.pt", tmp_path / "x.npy")


def test_a_runtime_that_is_killed_is_a_sentence(tmp_path, example, model):
    import os
    import signal

    folder = tmp_path / "torch"
    folder.mkdir()
    (tmp_path / "model.pt").rename(folder / "model.pt")
    with serve("torch", folder, tmp_path) as process:
        process.reply()
        os.kill(process._process.pid, signal.SIGSEGV)
        with pytest.raises(PeerError, match=r"its process crashed \(SIGSEGV\)"):
            process.ask(warm=0, runs=1, seconds=0.0)


def test_the_round_trip_between_cores(tmp_path):
    import os
    import shutil

    if len(os.sched_getaffinity(0)) < 2 or shutil.which("cc") is None:
        pytest.skip("needs two cores and a C compiler")
    trip = RoundTrip(tmp_path)
    trip.measure()
    assert len(trip.nanoseconds) == 1 and trip.nanoseconds[0] > 1
