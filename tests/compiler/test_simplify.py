"""Phase 0 leaves no BatchNorm and no pair of permutes, and computes the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from saevit_tvm import targets
from saevit_tvm.backends import cpu
from saevit_tvm.compiler import street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.models import weights
from saevit_tvm.models.opening import open_model, open_program

PERMUTE = "relax.permute_dims"


def module_of(net: nn.Module, size: int = 16, channels: int = 3) -> tvm.IRModule:
    example = (torch.randn(1, channels, size, size),)
    exported = torch.export.export(net.eval(), example, strict=False)
    return import_model(open_program(exported))


def simplified(mod: tvm.IRModule, *, channels_last: bool = False) -> tvm.IRModule:
    passes = street.simplify() + (cpu.layout() if channels_last else [])
    return street.run(mod, passes, tvm.target.Target(targets.native().tvm))


def operators(mod: tvm.IRModule) -> Counter[str]:
    names: Counter[str] = Counter()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            names[expr.op.name] += 1

    relax.analysis.post_order_visit(mod["main"], visit)
    return names


def inverse_permutes(mod: tvm.IRModule) -> int:
    """Permutes of permutes, and permutes that move nothing."""
    values = relax.analysis.get_var2val(mod["main"])
    count = 0

    def visit(expr: relax.Expr) -> None:
        nonlocal count
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get(PERMUTE):
            axes = [int(axis) for axis in expr.attrs.axes]
            inner = values.get(expr.args[0])
            stacked = isinstance(inner, relax.Call) and inner.op == tvm.ir.Op.get(PERMUTE)
            count += stacked or axes == sorted(axes)

    relax.analysis.post_order_visit(mod["main"], visit)
    return count


def outputs(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target(targets.native().tvm)), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


@pytest.mark.parametrize("name, size", [("saevit_micro", 64), ("saevit_micro", 57), ("saevit_xs", 96)])
def test_no_batch_norm_and_no_inverse_permutes_are_left(name: str, size: int) -> None:
    imported = import_model(open_model(name, image_size=size))
    assert operators(imported)["relax.nn.batch_norm"] > 0
    for channels_last in (False, True):
        mod = simplified(imported, channels_last=channels_last)
        assert operators(mod)["relax.nn.batch_norm"] == 0
        assert inverse_permutes(mod) == 0


def test_the_model_keeps_one_bias_a_convolution_and_nothing_else_of_batch_norm() -> None:
    mod = simplified(import_model(open_model("saevit_micro", image_size=64)))
    found = operators(mod)
    blocks = 4
    # Two residual adds and one more a block, one in the redistribution, two in attention's linears, the head's bias.
    biases = found["relax.nn.conv2d"] - (blocks - 1) + found["relax.nn.conv2d_transpose"]
    assert found["relax.add"] == biases + blocks * (3 + 1 + 2) + 1
    # Share times value, the redistribution's gain, and attention's scale: none of them is a BatchNorm's.
    assert found["relax.multiply"] == (blocks - 1) + blocks + blocks


class NormBefore(nn.Module):
    """BatchNorm before a 3x3 convolution with padding cannot be folded; before a 1x1 it can."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x))


class Shared(nn.Module):
    """One convolution whose result is used with and without its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) * y


NETS = {
    "conv, norm": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
    "conv with bias, norm": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)),
    "depthwise, norm": nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6)),
    "norm without affine": nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False)),
    "norm, 1x1": NormBefore(1),
    "norm, 3x3 with padding": NormBefore(3),
    "norm, relu": nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
    "norm, norm": nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
    "norm, mean, linear": nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)),
    "shared": Shared(),
}


@pytest.mark.parametrize("name", NETS)
def test_folding_keeps_the_result(name: str) -> None:
    net = NETS[name].eval()
    weights.randomise(net, seed=3)
    mod = simplified(module_of(net))
    x = np.random.RandomState(0).standard_normal((1, 3, 16, 16)).astype("float32")
    expected = net(torch.from_numpy(x)).detach().numpy()
    assert operators(mod)["relax.nn.batch_norm"] == 0
    assert np.abs(outputs(mod, x) - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())


def test_folding_really_folds() -> None:
    assert operators(simplified(module_of(NETS["norm, 1x1"].eval())))["relax.multiply"] == 0
    assert operators(simplified(module_of(NETS["norm, 3x3 with padding"].eval())))["relax.multiply"] == 1
