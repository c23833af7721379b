"""Regions are found by structure: every block of the model, its relatives, and nothing that only looks alike."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor, nn
from tvm import relax

import relay_patterns
import schedules
from saevit_tvm import targets
from saevit_tvm.compiler import pipeline
from saevit_tvm.compiler.importer import import_model
from saevit_tvm.models import create, saevit

SIZE = 32


def graph(net: nn.Module, size: int = SIZE, channels: int = 3) -> tvm.IRModule:
    exported = torch.export.export(net.eval(), (torch.randn(1, channels, size, size),), strict=False)
    mod = import_model(SimpleNamespace(onnx=None, name="net", exported=lambda: exported))
    return pipeline.run(mod, pipeline.simplify(), tvm.target.Target(targets.native().tvm))


def found(mod: tvm.IRModule) -> tuple[Counter[str], list[relay_patterns.Reading], tvm.IRModule]:
    for regions in (relay_patterns.blocks(), relay_patterns.layers()):
        mod = relay_patterns.fuse_regions(regions, lambda _region, _reading: True)(mod)
    composites = [relay_patterns.read_composite(func) for func in mod.functions.values()]
    matches = [composite for composite in composites if composite]
    return Counter(region.name for region, _ in matches), [reading for _, reading in matches], mod


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
    assert not any(isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) for value in values)


class Attention(saevit.SAA):
    """SAA as a residual block of its own."""

    def __init__(self, dim: int = 32, rate: int = 4) -> None:
        super().__init__(dim, rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class MeanAttention(Attention):
    """EdgeViT's way to sample: the plain mean of the window."""

    def aggregate(self, y: Tensor, rows: int, columns: int) -> Tensor:
        pooled = F.avg_pool2d(y.permute(0, 3, 1, 2), self.rate, self.rate)
        return pooled.permute(0, 2, 3, 1).reshape(-1, rows * columns, y.shape[-1])


@pytest.mark.parametrize("kind", [Attention, MeanAttention])
@pytest.mark.parametrize("rate", [2, 3, 4, 8])
def test_relatives_of_saa_match_at_any_rate(kind: type[Attention], rate: int) -> None:
    counts, readings, _ = found(graph(kind(32, rate), size=8 * rate, channels=32))
    assert counts == {"saa": 1}
    assert readings[0].shape | {"r": rate, "heads": 2, "h": 8 * rate} == readings[0].shape


@pytest.mark.parametrize("width", [8, 32])
def test_other_head_widths_match(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saevit, "HEAD_WIDTH", width)
    counts, readings, _ = found(graph(Attention(64, 2), size=8, channels=64))
    assert counts == {"saa": 1}
    assert readings[0].shape["heads"] == 64 // width


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


class UnscaledAttention(Attention):
    """Attention without its scale."""

    def attend(self, tokens: Tensor) -> Tensor:
        _, count, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(-1, count, 3, self.heads, 16).permute(2, 0, 3, 1, 4)
        mixed = (qkv[0] @ qkv[1].transpose(2, 3)).softmax(dim=-1) @ qkv[2]
        return self.proj(mixed.transpose(1, 2).reshape(-1, count, dim))


@pytest.mark.parametrize(
    "net, name, words",
    [
        (ReluCIFFN(32), "ciffn", ["relax.nn.gelu", "relax.nn.relu"]),
        (ReluDWSConv(32), "dwsconv", ["relax.nn.gelu", "relax.nn.relu"]),
        (WideDWSConv(32), "dwsconv", ["strides, paddings, groups or axes"]),
        (UnscaledAttention(), "saa", ["relax.multiply", "relax.nn.softmax"]),
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
    forbidden = {"saevit_tvm"} | ({"relay_patterns"} if package is schedules else {"schedules"})
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.split(".")[0] for name in names}, path
