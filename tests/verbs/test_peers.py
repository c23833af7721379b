"""Runtimes in processes of their own: a crash is a sentence, their answers are right, they end with us."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest

from saevit_tvm.support.errors import UsageError
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.bench import Expected, Runtime, _convert, _judged, prepared
from saevit_tvm.verbs.peers.base import OTHER_PYTHON
from saevit_tvm.verbs.peers.process import PeerError, PeerProcess
from saevit_tvm.verbs.roundtrip import RoundTrip

BIG = ("mnn", "executorch", "litert")  # the only ones that a machine for tests may do without


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
def source(tmp_path):
    """A model that every runtime can take, written down as `bench` does."""
    import torch

    from saevit_tvm.models.opening import open_model

    source = open_model("saevit_micro", image_size=64)
    torch.save(source.module, tmp_path / "model.pt")
    np.save(tmp_path / "x.npy", np.random.RandomState(0).standard_normal(source.input_shape).astype(np.float32))
    return source


def converted(name, tmp_path):
    runtime = Runtime(peers.get(name), tmp_path / name)
    if name in BIG and runtime.peer.missing():
        pytest.skip(f"{name} is not installed")
    runtime.folder.mkdir()
    _convert(runtime, tmp_path / "model.pt", tmp_path / "x.npy")
    return runtime


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torch", "onnxruntime", "openvino", "ncnn", *(pytest.param(name, marks=pytest.mark.slow) for name in BIG)]
)
def test_every_runtime_computes_what_pytorch_computes(name, source, tmp_path):
    runtime = converted(name, tmp_path)
    assert runtime.peer.size(runtime.folder) > 5e5
    with serve(name, runtime.folder, tmp_path) as process:
        told = process.reply()
        assert told["first_ms"] > 0 and told["version"][0].isdigit()
        assert len(process.ask(warm=0, runs=3, seconds=0.0)["times"]) == 3
        assert process.ask(warm=5, runs=None, seconds=0.5)["cores"] < 1.2
    (answer,) = np.load(tmp_path / "y.npz").values()
    (expected,) = source.reference(np.load(tmp_path / "x.npy"))
    assert np.abs(answer - expected).max() < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", *BIG])
def test_the_order_of_several_outputs_is_kept(name, tmp_path):
    import torch

    from saevit_tvm.models.opening import open_model

    source = open_model("saevit_micro", image_size=32, features_only=True)
    torch.save(source.module, tmp_path / "model.pt")
    x = np.random.RandomState(0).standard_normal(source.input_shape).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    runtime = converted(name, tmp_path)
    with serve(name, runtime.folder, tmp_path) as process:
        process.reply()
    answer = list(np.load(tmp_path / "y.npz").values())
    for got, expected in zip(answer, source.reference(x), strict=True):
        assert got.shape == expected.shape and np.abs(got - expected).max() < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "ncnn", "executorch", "litert"])
def test_a_runtime_that_takes_no_onnx_says_so(name, tmp_path):
    if peers.get(name).missing():
        pytest.skip(f"{name} is not installed")
    (tmp_path / "model.onnx").write_bytes(b"")
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    runtime = Runtime(peers.get(name), tmp_path / name)
    runtime.folder.mkdir()
    with pytest.raises(PeerError, match="it takes PyTorch modules, and this model is ONNX"):
        _convert(runtime, tmp_path / "model.onnx", tmp_path / "x.npy")


@pytest.mark.slow
def test_what_pnnx_leaves_unconverted_is_refused_and_not_run(tmp_path):
    import torch

    np.save(tmp_path / "x.npy", np.zeros((1, 3, 8, 8), np.float32))
    torch.save(torch.nn.Sequential(torch.nn.Unflatten(1, (1, 3)), torch.nn.Flatten(0, 1)), tmp_path / "model.pt")
    runtime = Runtime(peers.get("ncnn"), tmp_path / "ncnn")
    runtime.folder.mkdir()
    with pytest.raises(PeerError, match="pnnx could not convert"):
        _convert(runtime, tmp_path / "model.pt", tmp_path / "x.npy")


@pytest.mark.slow
def test_a_runtime_that_is_killed_is_a_sentence(tmp_path, source):
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


@pytest.mark.slow
def test_a_runtime_that_fails_costs_its_own_row(micro_artifact):
    """One answers for other weights, one cannot load its model; the rest is measured."""
    import torch

    from saevit_tvm.models.opening import open_model

    said: list[str] = []
    against = ["torch", "onnxruntime", "ncnn"]
    with prepared(micro_artifact, against=against, weights=None, say=said.append) as comparison:
        _, wrong, broken, _ = comparison.runtimes
        torch.save(open_model("saevit_micro", image_size=64, seed=1).module, wrong.folder / "model.pt")
        (broken.folder / "model.onnx").write_bytes(b"no model")
        told = comparison.measure(threads=1, runs=2, seconds=0.0)
    assert [row["name"] for row in told["results"]] == ["saevit-tvm", "ncnn"] and told["verified"]
    assert [row["name"] for row in told["failed"]] == ["torch", "onnxruntime"]
    assert "it is not timed, because its answer deviates from the model's by" in told["failed"][0]["error"]
    assert sum(line.startswith("converting") for line in said) == 3


def test_an_answer_of_another_shape_is_not_timed():
    expected = Expected("pytorch", [np.zeros((1, 10), np.float32)])
    assert _judged([np.full((1, 10), 1e-6, np.float32)], expected, 1e-4) == pytest.approx(1e-6)
    with pytest.raises(PeerError, match=r"shapes \[\(1, 9\)\] in place of \[\(1, 10\)\]"):
        _judged([np.zeros((1, 9), np.float32)], expected, 1e-4)
    with pytest.raises(PeerError, match="deviates from the model's by inf"):
        _judged([np.full((1, 10), np.nan, np.float32)], expected, 1e-4)


def test_a_worker_has_no_network():
    """What it tries to tell the world ends in its own process, where the system can cut it off at all."""
    code = (
        "import socket, sys\n"
        "from saevit_tvm.support.child import leave_network\n"
        "if not leave_network(): sys.exit(77)\n"
        "socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", code, str(server.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this system lets no process leave the network")
    assert "Network is unreachable" in done.stderr


def test_another_python_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv(OTHER_PYTHON, str(tmp_path / "python"))
    monkeypatch.setattr(peers.get("ncnn"), "modules", ("ncnn", "not_here"), raising=False)
    with pytest.raises(
        UsageError, match=r"SAEVIT_TVM_PEERS_PYTHON names '.*python', which cannot be run: No such file"
    ):
        peers.get("ncnn").missing()


def test_the_round_trip_between_cores(tmp_path):
    import os
    import shutil

    if len(os.sched_getaffinity(0)) < 2 or shutil.which("cc") is None:
        pytest.skip("needs two cores and a C compiler")
    trip = RoundTrip(tmp_path)
    trip.measure()
    assert len(trip.nanoseconds) == 1 and trip.nanoseconds[0] > 1
