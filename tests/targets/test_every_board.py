"""Each board's target builds the whole small model, for its own machine, and computes it wherever qemu can run it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from saevit_tvm import backends
from saevit_tvm.emulators import qemu
from saevit_tvm.runtime import elf
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.support.errors import TargetError
from saevit_tvm.targets import Target
from saevit_tvm.targets.arm import ARM_TARGETS
from saevit_tvm.targets.riscv import RISCV_TARGETS
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.sdk import SdkOptions, sdk

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(qemu.missing("aarch64") is not None, reason="needs qemu-user and a cross compiler"),
]


def quiet(_line: str) -> None:
    pass


@pytest.mark.parametrize("target", [*ARM_TARGETS, *RISCV_TARGETS], ids=lambda target: target.name)
def test_the_small_model_for_every_board(target: Target, tmp_path: Path, built_once: Callable[..., Path]) -> None:
    try:
        backends.require(target)
    except TargetError as error:
        pytest.skip(str(error))
    if backends.how_to_run(target) == "qemu":
        artifact = built_once(target.name, target=target.name, image_size=32)
        proof = read_manifest(artifact)["verification"]
        assert elf.read(artifact) == ("ELF", "shared library", target.arch)
        assert read_manifest(artifact)["target"]["name"] == target.name
        assert proof["passed"] and proof["proof"] == "qemu" and proof["max_abs_error"] < 2e-5
        libc = ", glibc in place of Android's libc" if "android" in target.tvm["mtriple"] else ""
        assert proof["machine"] == f"qemu, {target.emulator} model{libc}"
        return
    said: list[str] = []
    built = build(BuildOptions(model="saevit_micro", target=target.name, image_size=32, out=tmp_path), said.append)
    proof = built.manifest["verification"]
    if target.output == "objects":
        with tarfile.open(built.artifact) as tar:
            tar.extractall(tmp_path / "objects")
        made = {elf.read(path) for path in (tmp_path / "objects").iterdir() if path.suffix == ".o"}
        assert made == {elf.Binary("Mach-O", "object file", "arm64")} and proof["proof"] == "none"
        return
    assert elf.read(built.artifact) == ("ELF", "shared library", target.arch)
    assert read_manifest(built.artifact)["target"]["name"] == target.name
    # PyPI has no runtime of TVM for it, and the static flavour needs none.
    assert target.arch == "riscv64" and proof["proof"] == "none"
    assert any("PyPI has no runtime of TVM for riscv64" in line for line in [*said, *built.warnings])
    static = sdk(SdkOptions(built.artifact, tmp_path / "sdk"), quiet)["verification"]["static"]
    assert static["passed"] and static["proof"] == "qemu" and static["max_abs_error"] < 2e-5


def test_the_guide_for_a_raspberry_pi_can_be_followed() -> None:
    """Every command of it, from an empty folder, the board's programs under qemu."""
    line = [sys.executable, ROOT / "scripts" / "follow.py", ROOT / "docs" / "raspberry-pi.md"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    assert "%  7\n" in done.stdout and "saevit-tvm verify out/digits.so --device" in done.stdout
    assert "tvm" not in "".join(line for line in done.stdout.splitlines() if "NEEDED" in line)
