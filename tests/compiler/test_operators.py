"""Operators that TVM's importer lacks or gets wrong, held against PyTorch: one row each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor, nn
from tvm import relax

from saevit_tvm.compiler.importers import operators
from saevit_tvm.compiler.importers.prepare import prepared
from saevit_tvm.compiler.importers.torch import import_exported
from saevit_tvm.compiler.legalize import OPERATORS
from saevit_tvm.models.opening import open_program

Case = Callable[[Tensor], Tensor]
RANDOM = torch.Generator().manual_seed(1)
WEIGHTS = torch.randn(4, 3, 3, 3, generator=RANDOM)
GRID = torch.rand(2, 5, 7, 2, generator=RANDOM) * 2.4 - 1.2
ROWS, COLUMNS = torch.tensor([0, -3, 7]), torch.tensor([1, 2, 2])


def _resize(**how: object) -> Case:
    return lambda x: F.interpolate(x, **how)  # type: ignore[arg-type]


def _deconvolution(**how: int) -> Case:
    return lambda x: F.conv_transpose2d(x[:, :4], WEIGHTS, **how)


CASES: dict[str, list[Case]] = {
    "_upsample_bicubic2d_aa.default": [_resize(size=(3, 5), mode="bicubic", antialias=True)],
    "_upsample_bilinear2d_aa.default": [
        _resize(size=(3, 5), mode="bilinear", antialias=True),
        _resize(size=(13, 2), mode="bilinear", antialias=True, align_corners=True),
    ],
    "_upsample_nearest_exact2d.vec": [
        _resize(size=(13, 3), mode="nearest-exact"),
        _resize(scale_factor=1.3, mode="nearest-exact"),
    ],
    "adaptive_max_pool2d.default": [
        lambda x: F.adaptive_max_pool2d(x, (3, 5)),
        lambda x: F.adaptive_max_pool2d(x, (4, 1)),
    ],
    "amax.default": [lambda x: x.amax((2, 3)), lambda x: x.amax(1, keepdim=True)],
    "amin.default": [lambda x: x.amin((-1, 1))],
    "col2im.default": [
        lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 10), 2, stride=2),
        lambda x: F.fold(F.unfold(x, (3, 2), padding=1, stride=2, dilation=(1, 2)), (8, 10), (3, 2), (1, 2), 1, 2),
    ],
    "cumsum.default": [lambda x: x.cumsum(1), lambda x: (x > 0).cumsum(-1).float()],
    "div.Tensor_mode": [
        lambda x: torch.div(x, 0.3, rounding_mode="floor"),
        lambda x: torch.div(x, x + 5.5, rounding_mode="trunc"),
        lambda x: torch.div((9 * x).int(), 4, rounding_mode="trunc").float(),
        lambda x: ((9 * x).long() // -4).float(),
        lambda x: (9 * x).int() // (x.abs() + 1),
    ],
    "elu.default": [
        F.elu,
        F.selu,
        lambda x: F.elu(x, alpha=0.3),
        lambda x: torch.ops.aten.elu(x, 1.5, 2.0, 0.5),
    ],
    "exp2.default": [torch.exp2],
    "grid_sampler_2d.default": [
        lambda x: F.grid_sample(x, GRID + 0 * x[:, :1, :1, :1], align_corners=False),
        lambda x: F.grid_sample(x, GRID, padding_mode="border", align_corners=True),
        lambda x: F.grid_sample(x, GRID, mode="nearest", padding_mode="reflection", align_corners=False),
        lambda x: F.grid_sample(x, GRID, mode="bicubic", align_corners=False),
    ],
    "index.Tensor": [
        lambda x: x[:, :, ROWS, COLUMNS],
        lambda x: x[:, None, ROWS[:, None], :, COLUMNS],
        lambda x: x[:, ROWS, 2:, COLUMNS],
        lambda x: x[:, :, ROWS[:, None], COLUMNS],
        lambda x: x[:, x.argmax(1)[:, 0, 0], :, x.argmin(2)[:, 0, 0] - 8],
        lambda x: x[1, ROWS],
    ],
    "max.dim": [lambda x: x.max(1)[0], lambda x: x.max(-1, keepdim=True)[1].float()],
    "min.dim": [lambda x: x.min(2)[0], lambda x: x.min(1)[1].float()],
    "native_group_norm.default": [
        lambda x: F.group_norm(x, 2),
        lambda x: F.group_norm(x, 4, torch.arange(8.0), torch.ones(8)),
    ],
    "scatter.src": [
        lambda x: x.scatter(1, x.argsort(1)[:, :3], -x),
        lambda x: torch.zeros_like(x).scatter(-1, x.argmax(-1, keepdim=True), x.amax(-1, keepdim=True)),
    ],
    "scatter.value": [
        lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 2.0),
        lambda x: x.scatter(3, x.topk(3, -1)[1], 0.0),
    ],
    "select.int": [lambda x: x[:, -1], lambda x: x.select(-1, -10), lambda x: x[:, 2, :, -3]],
    "sort.default": [lambda x: x.sort(1)[0], lambda x: x.sort(2, descending=True)[1].float()],
    "sort.stable": [lambda x: (2 * x).round().sort(stable=True, dim=-1)[1].float()],
    "topk.default": [
        lambda x: x.topk(3, 1)[0],
        lambda x: x.topk(2, largest=False)[1].float(),
        lambda x: (x / (x > 0)).topk(4)[0],  # with infinities, and what is not a number
    ],
    "unfold.default": [lambda x: x.unfold(2, 3, 2), lambda x: x.unfold(2, 4, 4).unfold(3, 5, 5)],
    "upsample_bicubic2d.vec": [
        _resize(size=(13, 3), mode="bicubic"),
        _resize(scale_factor=(1.7, 0.6), mode="bicubic", align_corners=True),
    ],
    "upsample_bilinear2d.vec": [
        _resize(size=(13, 3), mode="bilinear"),
        _resize(scale_factor=1.7, mode="bilinear"),
        _resize(scale_factor=2, mode="bilinear", align_corners=True),
    ],
    "upsample_nearest2d.vec": [_resize(size=(13, 3)), _resize(scale_factor=1.7), _resize(scale_factor=2)],
}
# What TVM imports rightly, and lowers wrongly.
LOWERED: list[Case] = [
    _deconvolution(stride=2, dilation=2),
    _deconvolution(stride=2, padding=1, output_padding=1, dilation=3),
    _deconvolution(stride=2, output_padding=1),
]
# Other names of what is above.
ALIASES = {
    "argsort.default": "sort.default",
    "argsort.stable": "sort.stable",
    "div.Scalar_mode": "div.Tensor_mode",
    "floor_divide.default": "div.Tensor_mode",
    "_upsample_bicubic2d_aa.vec": "_upsample_bicubic2d_aa.default",
    "_upsample_bilinear2d_aa.vec": "_upsample_bilinear2d_aa.default",
    "_upsample_nearest_exact2d.default": "_upsample_nearest_exact2d.vec",
    "upsample_bicubic2d.default": "upsample_bicubic2d.vec",
    "upsample_bilinear2d.default": "upsample_bilinear2d.vec",
    "upsample_nearest2d.default": "upsample_nearest2d.vec",
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def check(function: Case, x: Tensor) -> set[str]:
    """The operators of a function, once it is seen that what is imported computes the same."""
    net = Net(function).eval()
    exported = torch.export.export(net, (x,), strict=False)
    mod = import_exported(open_program(exported)).mod
    mod = relax.transform.LegalizeOps(OPERATORS)(relax.transform.FoldConstant()(mod))
    machine = relax.VirtualMachine(relax.build(mod, tvm.target.Target("llvm")), tvm.cpu())
    answer = machine["main"](tvm.runtime.tensor(x.numpy())).numpy()
    expected = net(x).numpy()
    assert answer.shape == expected.shape
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)
    return {str(node.target).removeprefix("aten.") for node in prepared(exported).graph.nodes}


@pytest.mark.parametrize(("name", "case"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_it_computes_what_pytorch_computes(name: str, case: int) -> None:
    x = 3 * torch.randn(2, 8, 8, 10, generator=torch.Generator().manual_seed(0))
    assert name in check(CASES[name][case], x)


@pytest.mark.parametrize("case", range(len(LOWERED)))
def test_it_is_lowered_as_pytorch_computes(case: int) -> None:
    check(LOWERED[case], torch.randn(2, 8, 8, 10, generator=torch.Generator().manual_seed(0)))


def test_every_operator_of_ours_has_a_case() -> None:
    assert operators.converters().keys() == CASES.keys() | ALIASES.keys()
    assert CASES.keys() >= set(ALIASES.values())
