"""How the command line is held to its contract: by what a user's shell would see."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MAGIC = b"SAEVIT1\n"


def _refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> str:
    """The one sentence of a command that failed as it should."""
    *progress, sentence = done.stderr.splitlines() or [""]
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert sentence.startswith("saevit-tvm: ") and sentence.endswith((".", "?")), done.stderr
    assert not any(line.startswith(("saevit-tvm:", "Traceback")) for line in progress), done.stderr
    for word in words:
        assert word in sentence, sentence
    assert "this is a bug" not in sentence
    return sentence


def _parts(artifact: Path) -> tuple[bytes, dict[str, Any]]:
    """An artifact's library and manifest, read by the letter of the format."""
    data = artifact.read_bytes()
    assert data.endswith(MAGIC)
    (length,) = struct.unpack("<Q", data[-16:-8])
    return data[: -48 - length], json.loads(data[-48 - length : -48])


def _forge(library: bytes, manifest: dict[str, Any], path: Path) -> Path:
    """An artifact with any manifest at all, its digest right."""
    text = json.dumps(manifest).encode()
    digest = hashlib.sha256(library + text).digest()
    path.write_bytes(library + text + digest + struct.pack("<Q", len(text)) + MAGIC)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.RandomState(0).randint(0, 255, (80, 100, 3), np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small tmpfs with the given options; root ignores mere permissions."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a tmpfs needs root")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _during(
    action: Callable[[subprocess.Popen[str]], None],
    marker: str | None,
    delay: float,
    *args: str | Path,
    cwd: Path,
) -> subprocess.CompletedProcess[str]:
    """Runs a command and does something to it `delay` seconds after a line of progress begins with `marker`."""
    command = [sys.executable, "-m", "saevit_tvm", *map(str, args)]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen: list[str] = []
        assert process.stderr is not None
        while marker is not None and not (seen and seen[-1].startswith(marker)):
            seen.append(process.stderr.readline())
            assert seen[-1], f"no line began with '{marker}': {seen}"
        time.sleep(delay)
        action(process)
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, "".join(seen) + err)


def _interrupted(number: int, *args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same with a signal; the command must end soon."""
    sent = 0.0

    def send(process: subprocess.Popen[str]) -> None:
        nonlocal sent
        process.send_signal(number)
        sent = time.monotonic()

    done = _during(send, *args, **options)
    assert time.monotonic() - sent < 30
    return done


# Tests cannot import from here, so what they call comes as fixtures.


@pytest.fixture
def refused() -> Callable[..., str]:
    return _refused


@pytest.fixture
def parts() -> Callable[[Path], tuple[bytes, dict[str, Any]]]:
    return _parts


@pytest.fixture
def forge() -> Callable[[bytes, dict[str, Any], Path], Path]:
    return _forge


@pytest.fixture
def interrupted() -> Callable[..., subprocess.CompletedProcess[str]]:
    return _interrupted


@pytest.fixture
def during() -> Callable[..., subprocess.CompletedProcess[str]]:
    return _during
