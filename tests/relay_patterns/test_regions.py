"""Regions are found by structure: every block of the model, its relatives, and nothing that only looks alike."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor, nn
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

import relay_patterns
import schedules
from saevit_tvm import targets
from saevit_tvm.backends import compile_model
from saevit_tvm.compiler import street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.passes import DeclareKernels
from saevit_tvm.models import create, saevit, weights
from saevit_tvm.models.opening import open_program

SIZE = 32
Size = int | tuple[int, int]


def exported_program(
    net: nn.Module, size: Size = SIZE, channels: int = 3, batch: int = 1
) -> torch.export.ExportedProgram:
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.export.export(net.eval(), (torch.randn(batch, channels, height, width),), strict=False)


def graph(net: nn.Module, size: Size = SIZE, channels: int = 3, *, decompose: bool = True) -> tvm.IRModule:
    """Imported as the project imports, or by TVM's other mode, which keeps attention whole."""
    exported = exported_program(net, size, channels)
    if decompose:
        mod = import_model(open_program(exported))
    else:
        mod = from_exported_program(exported, unwrap_unit_return_tuple=True, run_ep_decomposition=False)
    return street.run(mod, street.simplify(), tvm.target.Target(targets.native().tvm))


def found(mod: tvm.IRModule) -> tuple[Counter[str], list[relay_patterns.Reading], tvm.IRModule]:
    readings: list[relay_patterns.Reading] = []
    for find in (relay_patterns.find_blocks, relay_patterns.find_primitives):
        readings += find(mod["main"], lambda _spec: True).values()
        mod = DeclareKernels(find, lambda _spec: True)(mod)
    return street.calls_of_kernels(mod), readings, mod


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("saevit_micro", {}, {"saa": 4, "ciffn": 4, "dwsconv": 4, "conv": 5, "head": 1}),
        ("saevit_micro", {"features_only": True}, {"saa": 4, "ciffn": 4, "dwsconv": 4, "conv": 5}),
        ("saevit_xs", {"num_classes": 7}, {"saa": 9, "ciffn": 9, "dwsconv": 9, "conv": 5, "head": 1}),
        ("saevit_s", {}, {"saa": 11, "ciffn": 11, "dwsconv": 11, "conv": 5, "head": 1}),
    ],
)
def test_every_block_is_found_and_nothing_else_is_left(name: str, options: dict, expected: dict[str, int]) -> None:
    counts, _, fused = found(graph(create(name, **options), size=64))
    assert counts == expected
    values = [binding.value for block in fused["main"].body.blocks for binding in block.bindings]
    assert {value.op.name for value in values if isinstance(value, relax.Call)} == {"relax.call_tir"}


@pytest.mark.slow
def test_every_block_is_found_where_windows_are_partly_filled() -> None:
    counts, _, _ = found(graph(create("saevit_micro"), (100, 36)))
    assert counts == {"saa": 4, "ciffn": 4, "dwsconv": 4, "conv": 5, "head": 1}


class Attention(saevit.SAA):
    """SAA as a residual block of its own."""

    def __init__(self, dim: int = 32, rate: int = 4) -> None:
        super().__init__(dim, rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class MeanAttention(Attention):
    """Samples the plain mean of the window, of what there is of it."""

    def aggregate(self, y: Tensor, rows: int, columns: int) -> Tensor:
        pooled = F.avg_pool2d(y.permute(0, 3, 1, 2), self.rate, self.rate, ceil_mode=True)
        return pooled.permute(0, 2, 3, 1).reshape(-1, rows * columns, y.shape[-1])


class StridedAttention(Attention):
    """Samples the first position of the window."""

    def aggregate(self, y: Tensor, rows: int, columns: int) -> Tensor:
        return y[:, :: self.rate, :: self.rate].reshape(-1, rows * columns, y.shape[-1])


class EdgeAttention(Attention):
    """EdgeViT's way to write that: a pool of one position."""

    def aggregate(self, y: Tensor, rows: int, columns: int) -> Tensor:
        pooled = F.avg_pool2d(y.permute(0, 3, 1, 2), 1, self.rate)
        return pooled.permute(0, 2, 3, 1).reshape(-1, rows * columns, y.shape[-1])


class ScaledDotProduct(Attention):
    """Attention as PyTorch offers it."""

    def attend(self, tokens: Tensor) -> Tensor:
        _, count, dim = tokens.shape
        parts = self.qkv(tokens).chunk(3, dim=-1)
        width = dim // self.heads
        query, key, value = (p.reshape(-1, count, self.heads, width).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=0.3)
        return self.proj(mixed.transpose(1, 2).reshape(-1, count, dim))


class Stacked(Attention):
    """Query, key and value stacked, as timm does it; `apart` takes them apart, `mix` attends."""

    def attend(self, tokens: Tensor) -> Tensor:
        _, count, dim = tokens.shape
        stacked = self.qkv(tokens).reshape(-1, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = self.mix(*self.apart(stacked))
        return self.proj(mixed.transpose(1, 2).reshape(-1, count, dim))

    def apart(self, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.unbind(0)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Indexed(Stacked):
    """Scales the query rather than the scores."""

    def apart(self, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked[0], stacked[1], stacked[2]

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query * 0.3 @ key.transpose(-2, -1)).softmax(dim=-1) @ value


class Unscaled(Stacked):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value


class NoBias(Attention):
    """No bias in the linear layers nor in the deconvolution."""

    def __init__(self, dim: int = 32, rate: int = 4) -> None:
        super().__init__(dim, rate)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        if rate > 1:
            self.recover = nn.ConvTranspose2d(dim, dim, rate, rate, groups=dim, bias=False)


SAMPLING = [Attention, MeanAttention, StridedAttention, EdgeAttention]
WRITING = [ScaledDotProduct, Stacked, Indexed, Unscaled, NoBias]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("rate", [2, 3, 4, 5, 8, 16])
def test_relatives_of_saa_match_at_any_rate(kind: type[Attention], rate: int) -> None:
    counts, readings, _ = found(graph(kind(32, rate), (2 * rate, 3 * rate), 32))
    assert counts == {"saa": 1}
    assert (readings[0].spec["r"], readings[0].spec["heads"], readings[0].spec.x.axes("W")) == (rate, 2, (3 * rate,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("size", [(9, 8), (8, 11), (7, 10), (3, 3)], ids=str)
def test_windows_may_be_partly_filled(kind: type[Attention], size: Size) -> None:
    counts, readings, _ = found(graph(kind(32, 4), size, 32))
    assert counts == {"saa": 1}
    assert readings[0].spec.x.axes("HW") == size


@pytest.mark.slow
@pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "whole"])
@pytest.mark.parametrize("rate", [1, 2])
@pytest.mark.parametrize("kind", [Attention, *WRITING])
def test_attention_matches_however_it_is_written_and_imported(
    kind: type[Attention], rate: int, decompose: bool
) -> None:
    counts, readings, _ = found(graph(kind(32, rate), 5, 32, decompose=decompose))
    assert counts == {"saa": 1}
    # TVM drops the scale of an attention that it keeps whole.
    scale = {ScaledDotProduct: 0.3 if decompose else 0.25, Indexed: 0.3, Unscaled: 1.0}.get(kind, 0.25)
    assert readings[0].spec["scale"] == pytest.approx(scale, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decompose", [True, False], ids=["decomposed", "whole"])
def test_the_whole_model_matches_in_both_import_modes(decompose: bool) -> None:
    net = create("saevit_micro")
    for block in (stage[-1] for stage in net.stages):
        block.saa.attend = MethodType(ScaledDotProduct.attend, block.saa)
    counts, _, _ = found(graph(net, 64, decompose=decompose))
    assert counts == {"saa": 4, "ciffn": 4, "dwsconv": 4, "conv": 5, "head": 1}


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1, 2])
@pytest.mark.parametrize("width", [8, 32, 64])
def test_other_head_widths_match(width: int, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saevit, "HEAD_WIDTH", width)
    counts, readings, _ = found(graph(Attention(128, rate), 4, 128))
    assert counts == {"saa": 1}
    assert readings[0].spec["heads"] == 128 // width


class Relatives(nn.Module):
    """Every way to sample and to write attention, one after another, at other rates and head widths."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [kind(32, rate) for kind, rate in zip(SAMPLING, (5, 3, 4, 16), strict=True)]
        blocks += [kind(32, rate) for kind, rate in zip(WRITING, (1, 3, 1, 3, 1), strict=True)]
        for block in blocks:
            if isinstance(block, (ScaledDotProduct, Stacked)):
                block.heads = 4 if block.rate == 1 else 1
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.mark.slow
def test_relatives_compute_what_pytorch_computes() -> None:
    net = Relatives()
    weights.randomise(net, seed=1)
    exported = exported_program(net, (7, 10), 32, batch=2)
    count = len(net.blocks)
    source = dataclasses.replace(open_program(exported), regions={"saa": count})
    compiled = compile_model(source, targets.native())
    assert compiled.regions["saa"] == {"found": count, "expected": count}
    x = torch.randn(2, 32, 7, 10)
    ours = relax.VirtualMachine(compiled.executable, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy())).numpy()
    theirs = net(x).detach().numpy()
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


class WrongTurn(Attention):
    """The operators of SAA, but its windows run the other way."""

    def windows(self, y: Tensor, rows: int, columns: int) -> Tensor:
        split = y.reshape(-1, rows, self.rate, columns, self.rate, y.shape[-1])
        return split.permute(0, 3, 1, 2, 4, 5).reshape(-1, rows * columns, self.rate**2, y.shape[-1])


class ReluCIFFN(saevit.CIFFN):
    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.depthwise(self.expand(self.norm(x))))
        return x + self.reduce(z + self.gain * (z - F.gelu(self.decompose(z))))


class ReluDWSConv(saevit.DWSConv):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(F.relu(self.depthwise(x)))


class WideDWSConv(saevit.DWSConv):
    """Dilated: DWSConv's operators, another algebra."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.depthwise.conv = nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ReluAttention(Stacked):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.relu(query @ key.transpose(-2, -1) * 0.25) @ value


class RowAttention(Stacked):
    """Positions attend to those of their own row only."""

    def __init__(self) -> None:
        super().__init__(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        rows = self.attend(y.reshape(-1, x.shape[3], x.shape[1]))
        return x + rows.reshape(y.shape).permute(0, 3, 1, 2)


class UnmaskedAttention(Attention):
    """Where a window is partly filled, the zeros around the image have a share."""

    def aggregate(self, y: Tensor, rows: int, columns: int) -> Tensor:
        _, height, width, _ = y.shape
        saliency = self.saliency(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        pad = (0, 0, 0, columns * self.rate - width, 0, rows * self.rate - height)
        share = self.windows(F.pad(saliency, pad), rows, columns).softmax(dim=2)
        return (share * self.windows(F.pad(y, pad), rows, columns)).sum(dim=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "net, name, words",
    [
        (ReluCIFFN(32), "ciffn", ["relax.nn.gelu", "relax.nn.relu"]),
        (ReluDWSConv(32), "dwsconv", ["relax.nn.gelu", "relax.nn.relu"]),
        (WideDWSConv(32), "dwsconv", ["strides, paddings, groups or axes"]),
        (ReluAttention(), "saa", ["needs relax.nn.softmax after relax.multiply", "relax.nn.relu"]),
        (RowAttention(), "saa", ["strides, paddings, groups or axes"]),
        (UnmaskedAttention(32, 5), "saa", ["strides, paddings, groups or axes"]),
        (WrongTurn(), "saa", ["strides, paddings, groups or axes"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_near_miss_names_the_first_operator_that_differs(net: nn.Module, name: str, words: list[str]) -> None:
    mod = graph(net, channels=32)
    counts, _, _ = found(mod)
    assert counts[name] == 0
    why = relay_patterns.missed(mod["main"], name)
    assert why is not None
    assert all(word in why for word in words), why


@pytest.mark.parametrize("package", [relay_patterns, schedules], ids=lambda package: package.__name__)
def test_graph_and_kernel_rooms_import_nothing_above_them(package) -> None:
    forbidden = {"saevit_tvm"} | ({"relay_patterns"} if package is schedules else set())
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.split(".")[0] for name in names}, path
