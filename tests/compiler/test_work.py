"""Multiply-adds of a graph are those that PyTorch counts."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saevit_tvm.compiler.importers.onnx import import_onnx
from saevit_tvm.compiler.importers.torch import import_exported
from saevit_tvm.compiler.work import multiply_adds
from saevit_tvm.models.opening import open_graph, open_program


class Net(torch.nn.Module):
    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


@pytest.mark.parametrize(
    ("shape", "compute"),
    [
        ((2, 8, 9, 7), lambda x: functional.conv2d(x, torch.ones(6, 4, 3, 2), stride=2, padding=1, groups=2)),
        ((2, 8, 9), lambda x: functional.conv1d(x, torch.ones(6, 8, 3))),
        ((1, 2, 4, 5, 6), lambda x: functional.conv3d(x, torch.ones(3, 2, 2, 2, 2))),
        ((2, 8, 5, 4), lambda x: functional.conv_transpose2d(x, torch.ones(8, 3, 3, 3), stride=2, groups=2)),
        ((2, 5, 8), lambda x: functional.linear(x, torch.ones(6, 8))),
        ((2, 5, 8), lambda x: x @ x.transpose(1, 2)),
        ((2, 5, 8), lambda x: torch.einsum("btc,bsc->ts", x, x)),
        ((2, 3, 5, 8), lambda x: functional.scaled_dot_product_attention(x, x, x)),
        ((2, 5, 8), lambda x: (x * x).sum(1)),
    ],
    ids=["conv2d", "conv1d", "conv3d", "transposed", "linear", "product", "einsum", "attention", "none"],
)
def test_as_pytorch_counts(shape: tuple[int, ...], compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute(x)
    mod = import_exported(open_program(torch.export.export(Net(compute).eval(), (x,)))).mod
    assert multiply_adds(mod) == counter.get_total_flops() / 2


@pytest.mark.parametrize("equation", ["...ij,...jk->...ik", "bij,bjk->bik", "bij, bjk"])
def test_products_by_index(equation: str) -> None:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 3]) for name in ("x", "w")]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 3] if "->" in equation else [3, 3])
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation=equation)
    model = helper.make_model(
        helper.make_graph([node], "g", tensors, [out]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.checker.check_model(model)
    assert multiply_adds(import_onnx(open_graph(model)).mod) == 2 * 3 * 3 * 3
