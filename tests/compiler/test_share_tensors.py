"""Views of planned storages: each is made once, and the answers stay."""

from __future__ import annotations

import numpy as np
import torch
import tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from saevit_tvm.compiler.passes import ShareTensors
from saevit_tvm.compiler.street import memory_plan, operators, run, virtual_machine

TARGET = tvm.target.Target("llvm")


class Steps(torch.nn.Module):
    """Products in a row, every other one of another view of what the one before it made."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.linspace(-0.5, 0.4, 64).reshape(8, 8)
        for _ in range(3):
            x = torch.bmm((x @ weight).reshape(2, 4, 8), weight.reshape(1, 8, 8).repeat(2, 1, 1)).reshape(8, 8)
        return x @ weight


def _imported() -> tvm.IRModule:
    program = torch.export.export(Steps(), (torch.zeros(8, 8),))
    return run(from_exported_program(program, unwrap_unit_return_tuple=True), operators(), TARGET)


def test_a_view_is_made_once() -> None:
    before = run(_imported(), memory_plan(), TARGET)["main"].script()
    after = run(_imported(), [*memory_plan(), ShareTensors()], TARGET)["main"].script()
    assert before.count("R.memory.alloc_tensor") == 7
    assert before.count("R.reshape") == 6
    # Two shapes in each of two storages, and the answer in a third one.
    assert after.count("R.memory.alloc_tensor") <= 5
    assert "R.reshape" not in after


def test_answers_stay() -> None:
    mod = run(_imported(), virtual_machine(), TARGET)
    machine = relax.VirtualMachine(relax.build(mod, TARGET, relax_pipeline=None), tvm.cpu())
    x = np.random.RandomState(0).standard_normal((8, 8)).astype(np.float32)
    expected = Steps()(torch.from_numpy(x)).numpy()
    for _ in range(2):  # the second time in the memory of the first
        np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x)).numpy(), expected, rtol=1e-5, atol=1e-6)
