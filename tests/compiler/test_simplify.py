"""Phase 0 leaves no BatchNorm and no pair of permutes, and computes the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from saevit_tvm import backends, targets
from saevit_tvm.backends import cpu
from saevit_tvm.compiler import street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.passes import KeepTokens, RemoveNoOps
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


def calls(mod: tvm.IRModule, name: str = "") -> list[relax.Call]:
    """Of one operator, or of all."""
    found: list[relax.Call] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name.startswith(name):
            found.append(expr)

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def operators(mod: tvm.IRModule) -> Counter[str]:
    return Counter(call.op.name for call in calls(mod))


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_pad_of_nothing_is_gone() -> None:
    padded = nn.Sequential(nn.ZeroPad2d(0), nn.ZeroPad2d((0, 1, 0, 0)))
    assert operators(module_of(padded))["relax.nn.pad"] == 2
    assert operators(simplified(module_of(padded)))["relax.nn.pad"] == 1


# Branches that are added up --------------------------------------------------------


class Branches(nn.Module):
    """Some branches over 8 channels, and what is made of them."""

    def __init__(self, made: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.made, self.layers = made, nn.ModuleDict(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.made(x, *self.layers.values())


def branch(kernel: int, groups: int = 1, to: int = 8, **how: int) -> nn.Module:
    padding = how.get("dilation", 1) * (kernel // 2)
    layer = nn.Conv2d(8, to, kernel, padding=padding, groups=groups, bias=False, **how)
    return nn.Sequential(layer, nn.BatchNorm2d(to))


def total(x: torch.Tensor, *branches: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return reduce(add, [each(x) for each in branches])


def twice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x + y) * y


def randomised(net: nn.Module) -> torch.Generator:
    """Weights and statistics as the generator gives them, from which there is more."""
    random = torch.Generator().manual_seed(3)
    for key, value in net.eval().state_dict().items():
        if value.is_floating_point():
            value.normal_(0.0, 0.5, generator=random)
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
    return random


# The branches, and how many convolutions, scales and sums are left.
BRANCHES: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {
    "three": (Branches(total, a=branch(3), b=branch(1), n=nn.BatchNorm2d(8)), (1, 0, 1)),
    "the smaller first": (Branches(total, a=branch(3), b=branch(5)), (1, 0, 1)),
    "with itself": (Branches(lambda x, a: x + a(x), a=branch(7, groups=8)), (1, 0, 1)),
    "groups": (Branches(lambda x, a, b: a(x) + x + b(x), a=branch(3, groups=2), b=branch(1, groups=2)), (1, 0, 1)),
    "strides": (Branches(total, a=branch(3, stride=2), b=branch(1, stride=2)), (1, 0, 1)),
    "dilation": (Branches(total, a=branch(3, dilation=2), b=branch(1)), (1, 0, 1)),
    "more channels": (Branches(total, a=branch(3, to=16), b=branch(1, to=16)), (1, 0, 1)),
    "less": (
        Branches(lambda x, a, n, m: x + m(n(x) - a(x)), a=branch(3, 8), n=nn.BatchNorm2d(8), m=nn.BatchNorm2d(8)),
        (1, 0, 1),
    ),
    "other windows": (
        Branches(lambda x, a, b: a(x)[..., :8, :8] + b(x)[..., 1:, 1:], a=branch(2), b=branch(3)),
        (2, 0, 3),
    ),
    "other dilation": (Branches(total, a=branch(3, dilation=2), b=branch(5)), (2, 0, 3)),
    "other groups": (Branches(total, a=branch(3, groups=8), b=branch(3)), (2, 0, 3)),
    "other values": (Branches(lambda x, a, b: a(x) + b(torch.relu(x)), a=branch(3), b=branch(1)), (2, 0, 3)),
    "used elsewhere": (Branches(lambda x, a: twice(x, a(x)), a=branch(3)), (1, 1, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_that_are_added_up_are_one_convolution_where_they_can_be(name: str) -> None:
    net, left = BRANCHES[name]
    random = randomised(net)
    mod = simplified(module_of(net, size=9, channels=8))
    found = operators(mod)
    assert tuple(found[f"relax.{each}"] for each in ("nn.conv2d", "multiply", "add")) == left
    assert found["relax.subtract"] == 0
    x = torch.randn(1, 8, 9, 9, generator=random)
    expected = net(x).detach().numpy()
    assert np.abs(outputs(mod, x.numpy()) - expected).max() < 2e-6 * np.abs(expected).max()


# What is computed of several convolutions side by side ---------------------------------


class SideBySide(nn.Module):
    """Three convolutions side by side, and what is made of them."""

    def __init__(self, made: Callable[..., torch.Tensor], first: nn.Module | None = None, channels: int = 16) -> None:
        super().__init__()
        first = first or nn.Conv2d(8, 6, 1, bias=False)
        convs = (first, nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 2, 5, padding=2))
        self.made, self.convs, self.norm = made, nn.ModuleList(convs), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.made(torch.cat([conv(x) for conv in self.convs], 1), self.norm)


def gated(y: torch.Tensor) -> torch.Tensor:
    return y * torch.sigmoid(y.mean((2, 3), keepdim=True))


SILU = nn.functional.silu


def read_twice(x: torch.Tensor, a: nn.Module, b: nn.Module, norm: nn.Module) -> torch.Tensor:
    y = a(x)
    return torch.cat([SILU(norm(torch.cat([y, b(x)], 1))), y], 1)


NORMED = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
# How many norms' scales are left, and functions before and behind the concatenation.
SIDE_BY_SIDE: dict[str, tuple[nn.Module, tuple[int, int, int]]] = {
    "norm, SiLU": (SideBySide(lambda y, norm: SILU(norm(y))), (0, 3, 0)),
    "norm, SiLU, gate": (SideBySide(lambda y, norm: gated(SILU(norm(y)))), (0, 3, 1)),
    "ReLU, norm": (SideBySide(lambda y, norm: SILU(norm(torch.relu(y)))), (3, 3, 0)),
    "numbers": (SideBySide(lambda y, norm: SILU(norm(y).clamp(-0.5, 0.7) - y.new_tensor(2.0))), (0, 3, 0)),
    "one has a norm": (SideBySide(lambda y, _: SILU(y), NORMED), (0, 3, 0)),
    "added to itself": (SideBySide(lambda y, norm: SILU(norm(y)) + y), (0, 3, 0)),
    "used elsewhere": (SideBySide(lambda y, norm: SILU(norm(y)) + y.flip(1)), (1, 0, 1)),
    "one is no convolution": (SideBySide(lambda y, norm: SILU(norm(y)), nn.AvgPool2d(3, 1, 1), 18), (1, 0, 1)),
    "one is read elsewhere": (
        Branches(read_twice, a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(8, 2, 3, padding=1), norm=nn.BatchNorm2d(8)),
        (1, 0, 1),
    ),
    "other factors at other places": (SideBySide(lambda y, _: SILU(y * torch.linspace(1, 2, 9))), (1, 0, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_what_convolutions_can_do_themselves_comes_before_their_concatenation(name: str) -> None:
    net, left = SIDE_BY_SIDE[name]
    random = randomised(net)
    mod = simplified(module_of(net, size=9, channels=8))
    before, _, behind = mod["main"].script().partition("R.concat")
    scales = re.findall(r"R.multiply\(\w+, metadata", before + behind)
    assert (len(scales), before.count("R.sigmoid"), behind.count("R.sigmoid")) == left
    assert operators(mod)["relax.nn.batch_norm"] == 0
    x = torch.randn(1, 8, 9, 9, generator=random)
    expected = net(x).detach().numpy()
    assert np.abs(outputs(mod, x.numpy()) - expected).max() < 2e-6 * np.abs(expected).max()


# Permutes that go down the graph ------------------------------------------------------


class Between(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self, made: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.made, self.first, self.last = made, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.made(self.first(x)))


def parts(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([second * 2, first, second.abs()], 1)[:, 2:10]


CONSTANT = torch.linspace(0.1, 1, 8 * 9).reshape(8, 9, 1)
BETWEEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "elements": lambda x: torch.exp(-x.abs()) / (x * x + 1.5),
    "constants": lambda x: (x - CONSTANT) * torch.linspace(1, 2, 9),
    "smaller ones": lambda x: x.sin() * x.amax((2, 3), keepdim=True) + x.mean(1, keepdim=True) + x.mean(2).unsqueeze(2),
    "comparisons": lambda x: torch.where(x > 0.1, x, x.floor()),
    "parts": parts,
    "slices": lambda x: nn.functional.pad(x[:, :, 1:-1:2, 2:], (1, 2, 3, 0), value=0.5),
    "softmax": lambda x: x.softmax(1) + x.sin(),
    "group norm": lambda x: nn.functional.group_norm(x.sin().unsqueeze(2), 4).squeeze(2),
    "layer norm": lambda x: nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "resize": lambda x: nn.functional.interpolate(x.sin(), scale_factor=2, mode="bilinear"),
    "pooling": lambda x: nn.functional.adaptive_avg_pool2d(x.sin(), (3, 3)),
    "tokens and back": lambda x: (x.flatten(2).transpose(1, 2) * 2).sin().transpose(1, 2).unflatten(2, (9, 9)),
    "a turned half": lambda x: x + x.transpose(2, 3),
}
MOVED = {"a turned half": 1}  # what really changes places


@pytest.mark.slow
@pytest.mark.parametrize("name", BETWEEN)
def test_between_kernels_nothing_is_moved_back_and_forth(name: str) -> None:
    torch.manual_seed(2)
    net, x = Between(BETWEEN[name]).eval(), torch.randn(2, 3, 9, 9)
    source = open_program(torch.export.export(net, (x,), strict=False))
    backend, recipe = backends.get("llvm"), street.Recipe(source, targets.native())
    mod = street.walked(backend, recipe, street.Found(), street.Dump(), last="layout")
    assert operators(mod)[PERMUTE] == 1 + MOVED.get(name, 0)  # what the model gives has its channels first
    compiled = street.compile_model(backend, recipe)
    answer = relax.VirtualMachine(compiled.executable, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy())).numpy()
    expected = net(x).detach().numpy()
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()


class Rows(nn.Module):
    """A matrix of all tokens, its norm and its bias, and only then tokens again: as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(9, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :6] + self.norm(self.linear(x).flatten(0, 2)).view(1, 8, 9, 6)


def test_tokens_keep_their_shape_through_products_and_their_norms() -> None:
    mod = simplified(module_of(Rows(), size=9, channels=8))
    assert operators(mod)["relax.reshape"] > 0
    kept = street.run(mod, [KeepTokens(), RemoveNoOps()], tvm.target.Target(targets.native().tvm))
    assert operators(kept)["relax.reshape"] == 0


class Windows(nn.Module):
    """Linear layers over windows that a permute made, whose weights PyTorch copies for each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.unflatten(3, (2, 8)).unflatten(2, (2, 8)).permute(0, 2, 4, 3, 5, 1)
        return self.linear(windows)


def test_weights_are_not_copied_for_each_window() -> None:
    torch.manual_seed(3)
    net, x = Windows().eval(), torch.randn(1, 3, 16, 16)
    mod = module_of(net)
    assert operators(mod)["relax.broadcast_to"] > 0
    mod = simplified(mod)
    (product,) = calls(mod, "relax.matmul")
    assert [int(extent) for extent in product.args[1].ty.shape] == [3, 5]
    expected = net(x).detach().numpy()
    assert np.abs(outputs(mod, x.numpy()) - expected).max() < 1e-5
