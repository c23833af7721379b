"""Token mixers of the papers around SAEViT, from PyTorch to a library for this CPU, held against PyTorch.

Where a decision was so near that rounding may turn it round, what depends on it is counted, and not compared.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor, nn
from tvm import relax

from saevit_tvm import backends, targets
from saevit_tvm.models.opening import open_program

PARTS = runpy.run_path(str(Path(__file__).with_name("mixers.py")))
TOLERANCE = 1e-4  # of the largest value
NEAR = 1e-5  # of a decision
FEW = 0.01  # of all tokens


def answer(net: nn.Module, x: Tensor, folder: Path) -> np.ndarray:
    """What the library gives that is built of a mixer."""
    program = torch.export.export(net, (x,), strict=False)
    backends.compile_model(open_program(program), targets.native()).export(folder / "mixer.so")
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(folder / "mixer.so")), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x.numpy())).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS["MIXERS"])
def test_it_is_computed_as_pytorch_does(name: str, tmp_path: Path) -> None:
    net, size = PARTS["made"](name), PARTS["SIZE"]
    x = torch.randn(2, PARTS["C"], size, size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected, margin = net.mixed(x) if hasattr(net, "mixed") else (net(x), None)
    ours = answer(net, x, tmp_path)
    assert ours.shape == expected.shape
    deviation = np.abs(ours - expected.numpy())
    if margin is not None:
        clear = margin.numpy() >= NEAR
        assert 1 - clear.mean() < FEW
        deviation = deviation[clear]
    assert deviation.max() < TOLERANCE * np.abs(expected.numpy()).max()
