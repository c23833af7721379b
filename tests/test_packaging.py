"""The wheel carries all that it needs and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = "tuning_logs/x86_64-made-up-2c/records.jsonl"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # From a copy of what git would publish: files left over in the checkout must not help.
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    shipped = source / RECORDS
    shipped.parent.mkdir()
    shipped.write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_room_and_no_test(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "saevit_tvm/models/checkpoints/digits.safetensors",
        "saevit_tvm/runtime/schemas/manifest.schema.json",
        "saevit_tvm/sdk/c/include/saevit.h",
        "saevit_tvm/sdk/c/src/static/pool.c",
        "saevit_tvm/runtime/opencl/plugin/plugin.cc",
        "relay_patterns/blocks/saa.py",
        "schedules/cpu/microkernel.py",
        "tuning_logs/__init__.py",
        RECORDS,
    ):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "scripts", "examples"))]


@pytest.mark.slow
def test_the_installed_wheel_builds_a_model_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "SAEVIT_TVM_CACHE": str(tmp_path / "cache")}
    where = "import saevit_tvm, schedules, relay_patterns, tuning_logs; print(saevit_tvm.__file__, schedules.__file__)"
    told = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(site)) for path in told.stdout.split())
    options = ["--model", "saevit_micro", "--weights", "digits", "--image-size", "64", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "saevit_tvm", "build", *options, "--name", "digits"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "out" / "digits.so").is_file()
