"""What a child process is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


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
