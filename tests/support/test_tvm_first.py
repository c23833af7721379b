"""TVM comes without PyTorch, which may be imported later."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from saevit_tvm.support.tvm_first import load_tvm_first

load_tvm_first()
import tvm, tvm_ffi
assert "torch" not in sys.modules
import torch
assert sys.modules["torch"] is torch
array = tvm.runtime.tensor(torch.arange(3.0).numpy())
print(array.numpy().sum() + torch.from_dlpack(array).sum().item(), tvm.__spec__.name)
"""


@pytest.mark.slow
def test_pytorch_may_come_later() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "6.0 tvm\n"), done.stderr


@pytest.mark.slow
def test_where_it_came_first_it_stays() -> None:
    program = "import torch\n" + PROGRAM.replace('assert "torch" not in sys.modules', "")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "6.0 tvm\n"), done.stderr
