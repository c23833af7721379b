"""A region is taken only where it may be: nothing inside has a user outside, and a bias is one number a channel.

Models that people bring, and that were once computed wrongly or were "a bug": each is right, region or not.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import tvm
from torch import Tensor, nn
from tvm import relax

from saevit_tvm import backends, targets
from saevit_tvm.backends import nvrtc
from saevit_tvm.compiler import street
from saevit_tvm.models.opening import open_model
from saevit_tvm.runtime import opencl
from saevit_tvm.verbs.build import BuildOptions, build

SIZE = 8  # as high and as wide as there are channels: a constant of one shape may mean either


class Block(nn.Module):
    """Something behind a convolution, SIZE channels in and out, on a picture of SIZE x SIZE."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(SIZE, SIZE, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.conv(x))

    def behind(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class SharedActivation(Block):
    def behind(self, y: Tensor) -> Tensor:
        return nn.functional.gelu(y) + y


class Hardswish(Block):
    def behind(self, y: Tensor) -> Tensor:
        return nn.functional.hardswish(y)


class SharedSum(Block):
    """The sum with the bias is used twice, once with another constant added."""

    def behind(self, y: Tensor) -> Tensor:
        return (y + 3.0) * y


class Embedded(Block):
    """A positional embedding: a number for each position of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(SIZE, SIZE, 3, padding=1, bias=False)
        self.embedding = nn.Parameter(torch.randn(1, SIZE, SIZE, SIZE))

    def behind(self, y: Tensor) -> Tensor:
        return y + self.embedding


class ByColumn(Embedded):
    """A number for each column, in a constant that has as many as there are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(SIZE))


class NormalisedByColumn(ByColumn):
    """The same before a BatchNorm, and a 1x1 convolution behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(SIZE), nn.BatchNorm2d(SIZE)
        self.point = nn.Conv2d(SIZE, SIZE, 1, bias=False)

    def behind(self, y: Tensor) -> Tensor:
        return self.point(self.other(torch.relu(self.norm(y + self.embedding)))) + self.embedding


class TwoHeads(nn.Module):
    """Two linear layers on one pooled mean, behind a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm2d(SIZE), nn.Linear(SIZE, 5), nn.Linear(SIZE, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.norm(x).mean((2, 3))
        return self.one(mean), self.two(mean)


BLOCKS = {
    "gelu(conv) + conv": SharedActivation,
    "conv -> hardswish": Hardswish,
    "(conv + 3) * conv": SharedSum,
    "conv + positional embedding": Embedded,
    "conv + constant by column": ByColumn,
    "conv + constant by column -> BatchNorm": NormalisedByColumn,
    "two heads on one mean": TwoHeads,
}


class All(nn.Module):
    """All of them, one behind the other; without the heads where their mean cannot be emulated."""

    def __init__(self, *, heads: bool = True) -> None:
        super().__init__()
        *blocks, last = (block() for block in BLOCKS.values())
        self.blocks, self.last = nn.ModuleList(blocks), last if heads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class OfPictures(nn.Module):
    """Pictures have three channels; these make SIZE of them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat((x, -x, x * x), 1)[:, :SIZE])


def saved(net: nn.Module, folder: Path) -> Path:
    """The model as people bring it, with weights and statistics that are not trivial."""
    random = torch.Generator().manual_seed(3)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.normal_(0.0, 0.3, generator=random)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(OfPictures(net).eval(), (torch.randn(1, 3, SIZE, SIZE),), strict=False), path)
    return path


def regions(path: Path) -> Counter[str]:
    source, target = open_model(str(path)), targets.native()
    recipe = street.Recipe(source, target)
    mod = street.walked(backends.get(target.kind), recipe, street.Found(), street.Dump(), last="regions")
    return street.calls_of_kernels(mod)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu(conv) + conv", {"conv": 1}),
        ("conv -> hardswish", {"conv": 1}),
        ("(conv + 3) * conv", {"conv": 1}),
        ("conv + positional embedding", {"conv": 1}),
        ("conv + constant by column", {"conv": 1}),
        ("conv + constant by column -> BatchNorm", {"conv": 2}),
        ("two heads on one mean", {"mean": 1, "linear": 2}),
    ],
)
def test_what_is_taken(name: str, expected: dict[str, int], tmp_path: Path) -> None:
    assert regions(saved(BLOCKS[name](), tmp_path)) == expected


class OfWholeNumbers(nn.Module):
    """Products of whole numbers beside one of fractions."""

    def forward(self, x: Tensor) -> Tensor:
        whole = (9 * x).int()
        return (whole @ whole.mT).float() + x @ x.mT


@pytest.mark.slow
def test_products_of_whole_numbers_are_no_kernels_of_fractions(tmp_path: Path) -> None:
    model = saved(OfWholeNumbers(), tmp_path)
    assert regions(model).total() == 1
    made = build(BuildOptions(str(model), out=tmp_path / "out"), lambda _line: None)
    assert made.manifest["verification"]["max_rel_error"] < 2e-5


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().amin(-1, keepdim=True).squeeze(-1)


def test_an_axis_that_is_counted_from_the_end_is_found_by_the_change_of_layouts(tmp_path: Path) -> None:
    source, target = open_model(str(saved(Squeezed(), tmp_path))), targets.native()
    recipe = street.Recipe(source, target)
    mod = street.walked(backends.get(target.kind), recipe, street.Found(), street.Dump(), last="layout")
    assert [int(extent) for extent in mod["main"].ret_ty.shape] == [1, SIZE, SIZE]


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (2 * x[:, :4, :6, :6]).sum(-2)


def test_sums_of_few_rows_are_scheduled_for_gpus(tmp_path: Path) -> None:
    """TVM's rule for sums makes of six times six what TVM cannot lower."""
    compiled = backends.compile_model(open_model(str(saved(Rows(), tmp_path))), targets.get("generic-opencl"))
    assert compiled.kernels["fallback"] == compiled.kernels["total"] == 2


def missing(target: str) -> str | None:
    if target == "generic-opencl":
        return None if opencl.available()[0] else opencl.available()[1]
    return nvrtc.missing() if target.startswith("cuda") else None


@pytest.mark.slow
@pytest.mark.parametrize("target", ["native", "generic-opencl", "cuda-sm_90", "metal", "webgpu"])
def test_all_of_them_are_right_everywhere(target: str, tmp_path: Path) -> None:
    """A build compares the artifact, or its kernels, with PyTorch; for Metal and WebGPU there is nothing to run."""
    if reason := missing(target):
        pytest.skip(reason)
    model = saved(All(heads=not target.startswith("cuda")), tmp_path)
    made = build(BuildOptions(str(model), target, out=tmp_path / "out"), lambda _line: None)
    proof = made.manifest["verification"]
    if target in ("metal", "webgpu"):
        assert made.artifact.suffix == ".tar" and not proof["passed"]
    else:
        assert 0 < proof.get("arithmetic", proof)["max_rel_error"] < 2e-5


def test_a_bias_is_one_number_a_channel() -> None:
    from relay_patterns.region import per_channel

    for shape, rank, axis, fits in [
        ((1, 4, 1, 1), 4, 1, True),
        ((4, 1, 1), 4, 1, True),
        ((1, 1), 4, 1, True),
        ((4,), 4, 1, False),
        ((1, 4, 4, 4), 4, 1, False),
        ((4, 1, 1, 1), 4, 1, False),
        ((4,), 3, -1, True),
        ((4, 1), 2, 1, False),
        ((1, 1, 4, 1, 1), 4, 1, False),
    ]:
        constant = relax.const(torch.ones(shape).numpy())
        assert (per_channel(constant, 4, rank, axis) is not None) == fits, shape
    assert isinstance(constant, tvm.ir.GenericConst)
