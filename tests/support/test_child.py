"""What a child process is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_python_that_knows_nothing_of_us_finds_us(tmp_path: Path) -> None:
    """As another interpreter, or one of another machine under qemu: no hook of an editable installation is there."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path}
    code = "from saevit_tvm.support.child import import_path; print(import_path())"
    told = subprocess.run([sys.executable, "-c", code], env=clean, check=True, **options).stdout.strip()
    alone = [sys.executable, "-S", "-c", "import saevit_tvm.support.child as us; print(us.__file__)"]
    assert subprocess.run(alone, env=clean, **options).returncode != 0
    found = subprocess.run(alone, env=clean | {"PYTHONPATH": told}, check=True, **options).stdout.strip()
    assert Path(found).samefile(Path(__file__).parents[2] / "saevit_tvm" / "support" / "child.py")


@pytest.mark.slow
def test_a_process_without_torch_has_all_of_tvm_that_a_worker_needs() -> None:
    code = (
        "from saevit_tvm.support.child import without_torch; without_torch()\n"
        "import sys; from saevit_tvm import backends; backends.get('llvm')\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'torch'], 'tvm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch'] True"
