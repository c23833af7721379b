"""Operators that TVM's importer lacks or gets wrong, held against PyTorch: one row each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor, nn
from tvm import relax

from saevit_tvm.compiler.importers import operators
from saevit_tvm.compiler.importers.torch import import_exported

CASES: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "elu.default": [
        nn.functional.elu,
        nn.functional.selu,
        lambda x: nn.functional.elu(x, alpha=0.3),
        lambda x: torch.ops.aten.elu(x, 1.5, 2.0, 0.5),
    ],
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(("name", "case"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_it_computes_what_pytorch_computes(name: str, case: int) -> None:
    net, x = Net(CASES[name][case]).eval(), 3 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(net, (x,), strict=False)
    assert name in {str(node.target).removeprefix("aten.") for node in exported.run_decompositions().graph.nodes}
    mod = import_exported(SimpleNamespace(name="net", exported=lambda: exported))
    machine = relax.VirtualMachine(relax.build(mod, tvm.target.Target("llvm")), tvm.cpu())
    answer = machine["main"](tvm.runtime.tensor(x.numpy())).numpy()
    np.testing.assert_allclose(answer, net(x).numpy(), rtol=1e-5, atol=1e-5)


def test_every_operator_of_ours_has_a_case() -> None:
    assert operators.converters().keys() == CASES.keys()
