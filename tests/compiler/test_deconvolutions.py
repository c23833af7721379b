"""A transposed convolution is a convolution and a shuffle, whatever its window, strides, padding and groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.passes import Deconvolutions
from saevit_tvm.models.opening import open_program


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": (4, 3), "stride": (2, 1), "padding": 1},
        {"kernel_size": 5, "stride": 3, "padding": (2, 0), "output_padding": (1, 0)},
        {"kernel_size": 1, "stride": 2},  # some results see nothing
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 3},
        {"kernel_size": 4, "stride": 4, "groups": 6},
    ],
    ids=str,
)
def test_it_computes_the_same(how: dict[str, int | tuple[int, int]]) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(6, 12, **how), nn.ReLU())
    x = torch.randn(2, 6, 5, 4)
    mod = import_model(open_program(torch.export.export(net.eval(), (x,), strict=False)))
    changed = Deconvolutions()(mod)
    assert "conv2d_transpose" in str(mod) and "conv2d_transpose" not in str(changed)
    built = tvm.compile(relax.transform.LegalizeOps()(changed), "llvm")
    found = relax.VirtualMachine(built, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy()))
    with torch.no_grad():
        np.testing.assert_allclose(found.numpy(), net(x).numpy(), atol=1e-5)


def test_a_dilated_one_stays() -> None:
    net = nn.ConvTranspose2d(2, 2, 3, dilation=2)
    mod = import_model(open_program(torch.export.export(net.eval(), (torch.randn(1, 2, 5, 5),), strict=False)))
    assert str(Deconvolutions()(mod)).count("conv2d_transpose") == str(mod).count("conv2d_transpose")
