"""Boards that are killed, stopped, crashed and too few: the run goes on, and the counts add up."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saevit_tvm import targets
from saevit_tvm.measure import rpc
from saevit_tvm.measure.candidates import Candidate, Result
from saevit_tvm.measure.rpc import RpcMeasurer
from saevit_tvm.measure.tracker import Tracker
from saevit_tvm.support.errors import TuningError
from saevit_tvm.targets import Target
from saevit_tvm.tuning.session import Session, Snapshot
from saevit_tvm.tuning.store import Store

pytestmark = pytest.mark.slow

boards = runpy.run_path(str(Path(__file__).with_name("boards.py")))
serving, queue, until, HERE = boards["serving"], boards["queue"], boards["until"], boards["HERE"]


@pytest.fixture(scope="session")
def tracker() -> Iterator[Tracker]:
    with boards["tracking"]() as tracker:
        yield tracker


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Our own server, compiled for this machine."""
    from saevit_tvm.verbs.rpc_server import rpc_server

    return [rpc_server("native", tmp_path_factory.mktemp("server") / "rpc")["program"]]


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that compiles is enough for these few candidates, and little patience for these near boards."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    for name, seconds in (("REACH", 4.0), ("RUN", 4.0), ("GRACE", 2.0), ("LOOK", 0.5), ("PAUSE", 0.2)):
        monkeypatch.setattr(rpc, f"{name}_SECONDS", seconds)


def search(
    store: Store, target: Target, matmul: Callable, open_measurer: Callable[[], RpcMeasurer], trials: int, show: Any
) -> Snapshot:
    session = Session([matmul()], target, store, model="test", measurer=open_measurer, show=show)
    return session.run(trials=trials)


def recorded(store: Store) -> list[Any]:
    return [trial for trials in store.trials.values() for trial in trials]


def kernel(name: str, body: str, key: str = "A") -> Candidate:
    """A candidate that calls a function of the C library when it runs."""
    import tvm

    source = (
        "@I.ir_module\nclass Module:\n  @T.prim_func\n"
        "  def main(A: T.Buffer((4,), 'float32')):\n"
        f"    T.func_attr({{'global_symbol': 'main'}})\n    {body}\n"
    )
    module = tvm.script.from_source(source, extra_vars={"T": tvm.script.tirx, "I": tvm.script.ir})
    return Candidate(name, [], tvm.ir.save_json(module), None)


def stores(count: int) -> list[Candidate]:
    return [kernel(f"k{number}", f"A[0] = T.float32({number})") for number in range(count)]


def measured(
    measurer: RpcMeasurer, *candidates: Candidate, after: dict[int, Callable[[], None]] | None = None
) -> dict[str, Result]:
    """The results by name; something may be done after so many of them."""
    results: dict[str, Result] = {}
    for candidate, result in measurer.measure(candidates, 1.0, lambda: False):
        assert candidate.key not in results, "one result each"
        results[candidate.key] = result
        (after or {}).get(len(results), lambda: None)()
    return results


def test_a_board_that_dies_costs_nothing(
    tracker: Tracker, server: list[str], tmp_path: Path, target: Target, matmul: Callable
) -> None:
    store, said, shown = Store(tmp_path, target.fingerprint), [], []
    with serving(server, tracker, "two") as victim, serving(server, tracker, "two"):

        def show(snapshot: Snapshot) -> None:
            shown.append(snapshot.trials)
            if snapshot.trials == 5 and victim.poll() is None:
                victim.kill()

        opened: list[RpcMeasurer] = []

        def open_measurer() -> RpcMeasurer:
            opened.append(RpcMeasurer(target, HERE, tracker.port, "two", say=said.append))
            assert len(opened[0].runners.workers) == 2
            return opened[0]

        result = search(store, target, matmul, open_measurer, 16, show)
    trials = recorded(Store(tmp_path, target.fingerprint))
    assert (result.trials, result.failed) == (16, 0), result.failures
    assert len(trials) == len({trial.candidate for trial in trials}) == 16
    assert victim.poll() is not None and shown[-1] == 16
    assert {trial.machine["device"] for trial in trials} == {"two"}


def test_a_board_that_hangs_is_given_up_and_its_candidate_measured_elsewhere(
    tracker: Tracker, server: list[str], target: Target
) -> None:
    said: list[str] = []

    def stop() -> None:
        time.sleep(0.5)  # for it to offer itself again
        os.killpg(victim.pid, signal.SIGSTOP)

    with (
        serving(server, tracker, "hang") as victim,
        serving(server, tracker, "hang"),
        RpcMeasurer(target, HERE, tracker.port, "hang", say=said.append) as measurer,
    ):
        results = measured(measurer, *stores(10), after={3: stop})
    assert len(results) == 10 and all(result.run_secs for result in results.values()), results
    assert any("was lost" in line for line in said), said


def test_no_board_is_left_and_then_one_comes_back(tracker: Tracker, server: list[str], target: Target) -> None:
    missed, done, said = threading.Event(), threading.Event(), []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("waiting: the tracker has no device"):
            missed.set()

    def come_back() -> None:
        missed.wait(60)
        with serving(server, tracker, "gone"):
            done.wait(60)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        with (
            serving(server, tracker, "gone") as victim,
            RpcMeasurer(target, HERE, tracker.port, "gone", say=say) as measurer,
        ):
            results = measured(measurer, *stores(6), after={2: victim.kill})
    finally:
        missed.set()
        done.set()
        thread.join()
    assert len(results) == 6 and all(result.run_secs for result in results.values()), results
    assert any(line.startswith("waiting: the tracker has no device") for line in said), said


def test_a_board_that_another_uses_is_waited_for(tracker: Tracker, server: list[str], target: Target) -> None:
    from tvm import rpc as client

    said: list[str] = []
    with serving(server, tracker, "shared"):
        request = tracker.request("shared")
        lent: list[Any] = []
        until(lambda: lent.append(request.granted()) or lent[-1] is not None)
        session = client.connect(lent[-1].host, lent[-1].port, lent[-1].match_key)

        def say(line: str) -> None:
            said.append(line)
            session.get_function("CloseRPCConnection")()

        with RpcMeasurer(target, HERE, tracker.port, "shared", say=say) as measurer:
            results = measured(measurer, *stores(2))
    assert said == ["waiting: every device with the key 'shared' is in use, 1 in all"]
    assert len(results) == 2 and all(result.run_secs for result in results.values()), results


def test_patience_ends_when_no_board_comes(
    tracker: Tracker, server: list[str], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "PATIENCE_SECONDS", 2.0)
    with serving(server, tracker, "over") as victim, RpcMeasurer(target, HERE, tracker.port, "over") as measurer:
        victim.kill()
        with pytest.raises(TuningError, match=r"gave up after .* without a device"):
            measured(measurer, kernel("fine", "T.evaluate(0)"))


def test_a_kernel_that_crashes_or_hangs_is_blamed_and_the_server_lives(
    tracker: Tracker, server: list[str], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "REACH_SECONDS", 2.0)
    monkeypatch.setattr(rpc, "RUN_SECONDS", 1.0)
    crash, hang = kernel("crash", "T.call_extern('int32', 'abort')"), kernel("hang", "T.call_extern('int32', 'pause')")
    with (
        serving(server, tracker, "bad") as board,
        RpcMeasurer(target, HERE, tracker.port, "bad") as measurer,
    ):
        results = measured(measurer, crash, hang, kernel("fine", "T.evaluate(0)"))
        assert board.poll() is None
        until(lambda: queue(tracker, "bad").free == 1)
    assert results["crash"].failure == "run crashed" and "Aborted" in (results["crash"].words or "")
    assert results["hang"].failure == "run timed out"
    assert results["fine"].run_secs and results["fine"].failure is None


def test_a_kernel_that_takes_board_after_board_along_is_blamed_in_the_end(
    tracker: Tracker, server: list[str], target: Target, tmp_path: Path
) -> None:
    """The kernel kills the server itself, as a board does that crashes as a whole."""
    fatal = kernel("fatal", "T.call_extern('int32', 'kill', T.call_extern('int32', 'getppid'), 9)")
    loop = tmp_path / "loop"
    loop.write_text('#!/bin/sh\nwhile :; do "$@"; done\n')
    loop.chmod(0o755)
    with serving([loop, *server], tracker, "fatal"), RpcMeasurer(target, HERE, tracker.port, "fatal") as measurer:
        results = measured(measurer, fatal, kernel("fine", "T.evaluate(0)"))
    assert results["fatal"].failure == "device lost" and "3 devices" in (results["fatal"].words or "")
    assert results["fine"].failure is None


def test_the_server_that_tvm_brings_works_too(tracker: Tracker, target: Target) -> None:
    port = boards["free_port"]()
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", HERE, "--port", port, "--port-end", port + 1]
    with boards["started"]([*command, "--tracker", f"{HERE}:{tracker.port}", "--key", "python"]):
        until(lambda: queue(tracker, "python").servers == 1)
        with RpcMeasurer(target, HERE, tracker.port, "python") as measurer:
            results = measured(measurer, kernel("one", "T.evaluate(0)"), kernel("two", "A[0] = T.float32(1)"))
    assert all(result.run_secs for result in results.values()), results


def test_wrong_addresses_are_one_sentence(tracker: Tracker, server: list[str], target: Target) -> None:
    with (
        serving(server, tracker, "there"),
        pytest.raises(TuningError, match=r"no server with the key 'rpi9'; it has .*there \(1\).*: check the key"),
    ):
        RpcMeasurer(target, HERE, tracker.port, "rpi9")
    with pytest.raises(TuningError, match=r"no RPC tracker answers at .* start one with"):
        RpcMeasurer(target, HERE, boards["free_port"](), "rpi4")


def test_doctor_says_what_the_tracker_sees(tracker: Tracker, server: list[str], cli: Callable) -> None:
    with serving(server, tracker, "seen"), serving(server, tracker, "seen"):
        done = cli("doctor", "--rpc", f"{HERE}:{tracker.port}", "--json")
        table = cli("doctor", "--rpc", f"{HERE}:{tracker.port}").stdout
    result = json.loads(done.stdout)
    (row,) = [row for row in result["keys"] if row["key"] == "seen"]
    assert row == {"key": "seen", "servers": 2, "free": 2, "busy": 0, "pending": 0}
    assert sum(entry["key"] == "seen" for entry in result["servers"]) == 2
    assert "seen" in table and HERE in table


# arm64, under emulation -------------------------------------------------------


@pytest.fixture(scope="session")
def arm_server(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from saevit_tvm.emulators import qemu
    from saevit_tvm.verbs.rpc_server import rpc_server

    if qemu.find("aarch64") is None:
        pytest.skip("needs qemu-user")
    made = rpc_server("rpi4", tmp_path_factory.mktemp("arm") / "rpc")
    assert len(Path(made["readme"]).read_text().splitlines()) == 10
    return qemu.command("aarch64", "cortex-a76", [made["program"]])


def test_candidates_for_arm64_run_on_an_arm64_server(
    tracker: Tracker, arm_server: list[str], tmp_path: Path, matmul: Callable
) -> None:
    target = targets.get("rpi4")
    store = Store(tmp_path, target.fingerprint)
    with serving(arm_server, tracker, "arm"):
        result = search(
            store,
            target,
            matmul,
            lambda: RpcMeasurer(target, HERE, tracker.port, "arm"),
            3,
            lambda _snapshot: None,
        )
    assert (result.trials, result.failed) == (3, 0), [trial.words for trial in recorded(store)]
    assert all(trial.target == target.fingerprint for trial in recorded(store))


def test_an_artifact_is_verified_on_the_device(
    tracker: Tracker, arm_server: list[str], cli: Callable, rpi5_artifact: Path
) -> None:
    address = f"rpc://{HERE}:{tracker.port}"
    with serving(arm_server, tracker, "rpi5"):
        done = cli("verify", rpi5_artifact, "--device", f"{address}/rpi5", "--json")
        missed = cli("verify", rpi5_artifact, "--device", f"{address}/rpi6")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["passed"], result["proof"]) == (True, "device")
    assert result["machine"] == f"the device {address}/rpi5"
    assert missed.returncode == 1 and "no server with the key 'rpi6'; it has" in missed.stderr
