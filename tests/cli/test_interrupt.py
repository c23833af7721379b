"""Real signals to real runs: a clean stop, one sentence, status 128 + signal, nothing half-written."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

BUILD = ("build", "--no-cache", "--model", "saevit_micro", "--image-size", "64", "--out", "deep/out")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stopped_cleanly(done, number: int, folder: Path, *kept: str) -> None:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert done.returncode == 128 + number, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"saevit-tvm: stopped by {name}; ")
    assert done.stderr.count("saevit-tvm:") == 1 and "Traceback" not in done.stderr
    assert names(folder) == sorted(kept)


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work").mkdir()
    yield
    assert names(tmp_path / "tmp") == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "delay"), [(signal.SIGINT, 0.4), (signal.SIGTERM, 1.5)])
def test_while_libraries_load(tmp_path, number, delay, interrupted):
    done = interrupted(number, None, delay, *BUILD, cwd=tmp_path / "work")
    stopped_cleanly(done, number, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, pytest.param(2.0, marks=pytest.mark.slow), 4.0])
def test_while_compiling(tmp_path, delay, interrupted, monkeypatch):
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path / "cache"))  # an import of its own lasts for seconds
    done = interrupted(signal.SIGINT, "compiling", delay, *BUILD, cwd=tmp_path / "work")
    stopped_cleanly(done, signal.SIGINT, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["linking", "verifying"])
def test_late_in_a_build(tmp_path, stage, interrupted):
    done = interrupted(signal.SIGINT, stage, 0.2, *BUILD, cwd=tmp_path / "work")
    stopped_cleanly(done, signal.SIGINT, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["converting", pytest.param("measuring", marks=pytest.mark.slow)])
def test_while_benching(tmp_path, micro_artifact, stage, interrupted):
    command = ("bench", micro_artifact, "--against", "torch")
    done = interrupted(signal.SIGINT, stage, 0.5, *command, cwd=tmp_path / "work")
    stopped_cleanly(done, signal.SIGINT, tmp_path / "work")
    assert not survivors(tmp_path)


@pytest.mark.slow
def test_while_benching_two(tmp_path, micro_artifact, interrupted):
    command = ("bench", micro_artifact, micro_artifact)
    done = interrupted(signal.SIGINT, "measuring", 0.5, *command, cwd=tmp_path / "work")
    stopped_cleanly(done, signal.SIGINT, tmp_path / "work")
    assert not survivors(tmp_path)


@pytest.mark.slow
def test_while_verifying(tmp_path, micro_artifact, interrupted):
    done = interrupted(signal.SIGINT, None, 2.5, "verify", micro_artifact, cwd=tmp_path / "work")
    if done.returncode != 0:  # a fast machine is done by then
        stopped_cleanly(done, signal.SIGINT, tmp_path / "work")


@pytest.mark.slow
def test_while_tuning_keeps_what_was_measured(tmp_path, interrupted):
    command = ("tune", "--model", "saevit_micro", "--image-size", "64", "--trials", "500", "--store", "store")
    done = interrupted(signal.SIGINT, "trials", 3.0, *command, cwd=tmp_path / "work")
    # The store is made with the first measurement, and a slow machine has none by now.
    stopped_cleanly(done, signal.SIGINT, tmp_path / "work", *names(tmp_path / "work"))
    assert names(tmp_path / "work") in ([], ["store"])
    assert "what was measured is kept, and the same command goes on" in done.stderr


@pytest.mark.slow
def test_an_older_artifact_survives(tmp_path, micro_artifact, interrupted):
    old = tmp_path / "work" / "deep" / "out" / "a.so"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    done = interrupted(signal.SIGINT, "compiling", 1.0, *BUILD, "--name", "a", cwd=tmp_path / "work")
    stopped_cleanly(done, signal.SIGINT, tmp_path / "work", "deep")
    assert names(old.parent) == ["a.so"] and old.read_bytes() == b"old"


def survivors(folder: Path) -> list[str]:
    """Processes that still work in this test's temporary folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command and "saevit_tvm" in command:
            found.append(command)
    return found
