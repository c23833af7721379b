"""OpenCL on a board that has no Python: the C server with our plugin beside it, on loopback, PoCL behind it."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm import targets
from saevit_tvm.emulators import qemu
from saevit_tvm.measure.candidates import Candidate
from saevit_tvm.measure.rpc import RpcMeasurer
from saevit_tvm.measure.tracker import Tracker
from saevit_tvm.runtime import elf, opencl
from saevit_tvm.support import toolchain
from saevit_tvm.support.errors import TargetError
from saevit_tvm.verbs.rpc_server import rpc_server

TARGET = "generic-opencl"
LENGTH, GROUP = 1024, 64
boards = runpy.run_path(str(Path(__file__).parents[1] / "tuning" / "boards.py"))
serving, HERE = boards["serving"], boards["HERE"]
needs_driver = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])


@pytest.fixture(scope="module")
def tracker() -> Iterator[Tracker]:
    with boards["tracking"]() as tracker:
        yield tracker


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = rpc_server(TARGET, tmp_path_factory.mktemp("server") / "rpc")
    assert made["libraries"][-1].endswith("libsaevit_opencl.so")
    assert "its GPU's OpenCL driver" in Path(made["readme"]).read_text()
    return Path(made["program"])


@pytest.fixture
def address(tracker: Tracker) -> str:
    return f"rpc://{HERE}:{tracker.port}"


def doubling(name: str, group: int = GROUP) -> Candidate:
    """A candidate that doubles numbers, bound to work-groups of some size."""
    import tvm
    from tvm.script import from_source, tirx

    source = f"""
@T.prim_func(s_tir=True)
def main(x: T.Buffer(({LENGTH},), "float32"), out: T.Buffer(({LENGTH},), "float32")):
    T.func_attr({{"global_symbol": "main"}})
    for b in T.thread_binding({LENGTH // group}, thread="blockIdx.x"):
        for t in T.thread_binding({group}, thread="threadIdx.x"):
            out[b * {group} + t] = x[b * {group} + t] * T.float32(2)
"""
    module = tvm.IRModule({"main": from_source(source, extra_vars={"T": tirx})})
    return Candidate(name, [], tvm.ir.save_json(module), None)


@pytest.mark.slow
@needs_driver
def test_an_artifact_is_verified_on_the_device(
    tracker: Tracker, server: Path, address: str, cli: Callable[..., Any], opencl_artifact: Path
) -> None:
    with serving([server], tracker, "gpu"):
        done = cli("verify", opencl_artifact, "--device", f"{address}/gpu", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["passed"], result["proof"]) == (True, "device")
    assert result["max_rel_error"] < 2e-5


@pytest.mark.slow
@needs_driver
def test_candidates_are_measured_on_the_device(tracker: Tracker, server: Path) -> None:
    """Also one whose work-groups the device refuses: that is the candidate's failure, and the next one is measured."""
    with (
        serving([server], tracker, "tune"),
        RpcMeasurer(targets.get(TARGET), HERE, tracker.port, "tune") as measurer,
    ):
        candidates = [doubling("fits"), doubling("other", 128)]
        results = {each.key: result for each, result in measurer.measure(candidates, 1.0, lambda: False)}
    assert {key for key, result in results.items() if result.run_secs} == {"fits", "other"}, results
    assert all(0 < seconds < 1 for result in results.values() for seconds in result.run_secs)


@pytest.mark.slow
def test_a_board_without_a_driver_says_so(
    tracker: Tracker,
    server: Path,
    address: str,
    cli: Callable[..., Any],
    opencl_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path))
    with serving([server], tracker, "blind"):
        monkeypatch.undo()
        done = cli("verify", opencl_artifact, "--device", f"{address}/blind")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "no OpenCL driver offers a device" in done.stderr


@pytest.mark.slow
def test_a_plugin_that_cannot_be_loaded_is_said_at_the_start(server: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(server.parent, tmp_path / "rpc"))
    (folder / "libsaevit_opencl.so").write_bytes(b"nothing of the kind")
    done = subprocess.run([folder / "rpc-server", "--port", "0"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "the plugin for OpenCL cannot be loaded" in done.stderr


@pytest.mark.slow
def test_boards_with_a_mali_get_an_arm_plugin(tmp_path: Path) -> None:
    """Not run on a GPU; under qemu the server loads it, so every symbol of TVM's runtime for arm64 is found."""
    target = targets.get("mali")
    try:
        toolchain.cxx(target)
    except TargetError as error:
        pytest.skip(str(error))
    made = rpc_server("mali", tmp_path / "rpc")
    plugin = Path(made["libraries"][-1])
    assert elf.read(plugin) == ("ELF", "shared library", "aarch64")
    dynamic = subprocess.run(
        ["readelf", "-dW", "--dyn-syms", plugin], capture_output=True, text=True, check=True
    ).stdout
    for needed in ("[libtvm_runtime.so]", "[libtvm_ffi.so]", "[libstdc++.so.6]", "[$ORIGIN]"):
        assert needed in dynamic
    assert "libOpenCL" not in dynamic and " UND clCreate" not in dynamic, "the driver is found when it is first used"
    if qemu.missing("aarch64"):
        return
    command = qemu.command("aarch64", "cortex-a76", [made["program"], "--port", "0"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
    assert said.rstrip().endswith("with OpenCL"), said


def test_there_is_none_for_android_and_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="TVM publishes its runtime for Linux only"):
        rpc_server("adreno", tmp_path / "rpc")
    with pytest.raises(TargetError, match=r"needs a C\+\+ compiler with libstdc\+\+ for aarch64-linux-android"):
        toolchain.cxx(targets.get("adreno"))
