"""Queries, keys and values that are parts of other tensors: attention reads them there, and nothing copies them out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor, nn
from tvm import relax

from saevit_tvm import backends, targets
from saevit_tvm.compiler import street
from saevit_tvm.models.opening import open_program

WINDOWS, TOKENS, HEADS, WIDTH = 4, 9, 3, 8
C = HEADS * WIDTH

Mix = Callable[[Tensor], Tensor]


def joined(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(F.scaled_dot_product_attention(q, k, v))


def unbound(qkv: Tensor) -> Tensor:
    """As ViT has it."""
    return mixed(*qkv.reshape(WINDOWS, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0))


def selected(qkv: Tensor) -> Tensor:
    parts = qkv.reshape(WINDOWS, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return mixed(parts[0], parts[1], parts[2])


def split_unevenly(qkv: Tensor) -> Tensor:
    """As LeViT has it: keys are narrower than values."""
    q, k, v = qkv.view(WINDOWS, TOKENS, HEADS, 3 * WIDTH).split([4, 4, 16], dim=3)
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    return joined(((q @ k) * 0.4).softmax(-1) @ v)


def scaled(qkv: Tensor) -> Tensor:
    """As Swin has it, but scaled before the heads are turned; and some tokens are no queries."""
    q, k, v = (part.unflatten(2, (HEADS, WIDTH)) for part in qkv.chunk(3, 2))
    q, k, v = (0.3 * q[:, 2:]).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return joined((q @ k.transpose(2, 3)).softmax(-1) @ v)


def with_values(qkv: Tensor) -> Tensor:
    """Values are used once more, as CSWin's are."""
    q, k, v = qkv.reshape(WINDOWS, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return mixed(q, k, v) + joined(v)


def in_a_picture(qkv: Tensor) -> Tensor:
    """Tokens of four axes, as MaxViT has them."""
    return unbound(qkv.view(WINDOWS, 3, 3, 3 * C).flatten(1, 2))


def in_one_axis(qkv: Tensor) -> Tensor:
    """As PyTorch's own module has it, tokens first and heads beside images; what follows the tokens is taken along."""
    q, k, v = (part.reshape(WINDOWS, TOKENS * HEADS, WIDTH).transpose(0, 1) for part in qkv.chunk(3, 2))
    shares = (0.4 * q @ k.transpose(1, 2)).softmax(-1)
    return F.hardswish((shares @ v).transpose(0, 1).reshape(WINDOWS, TOKENS, C))


def images_apart_at_last(qkv: Tensor) -> Tensor:
    """Images and heads are one axis for the kernel, and two behind it: tokens are not put together as it gives them."""
    q, k, v = (part.flatten(0, 1) for part in qkv.unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4))
    shares = ((0.4 * q) @ (0.9 * k).transpose(1, 2)).softmax(-1)
    return torch.sigmoid(joined((shares @ (0.8 * v)).unflatten(0, (WINDOWS, HEADS))))


def by_channel(qkv: Tensor) -> Tensor:
    """As XCiT and DaViT have it: channels attend to channels, and those of a token lie apart."""
    q, k, v = qkv.reshape(WINDOWS, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 4, 1)
    return F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2).flatten(2)


def in_other_order(qkv: Tensor) -> Tensor:
    """Only a copy gives queries these shapes."""
    q = qkv[..., :C].transpose(1, 2).reshape(WINDOWS, HEADS, TOKENS, WIDTH)
    k, v = (part.unflatten(2, (HEADS, WIDTH)).transpose(1, 2) for part in qkv.chunk(3, 2)[1:])
    return mixed(q, k, v)


# What is made of queries, keys and values, and how many kernels are left to the rules.
MIXES: dict[str, tuple[Mix, int]] = {
    "unbound": (unbound, 0),
    "selected": (selected, 0),
    "split unevenly": (split_unevenly, 0),
    "scaled": (scaled, 0),
    "with values": (with_values, 1),
    "in a picture": (in_a_picture, 0),
    "in one axis": (in_one_axis, 1),
    "images apart at last": (images_apart_at_last, 4),
    "by channel": (by_channel, 4),
    "in other order": (in_other_order, 1),
}


class Block(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix, self.qkv, self.out = mix, nn.Linear(C, 3 * C), nn.LazyLinear(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.qkv(x)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
def test_attention_reads_parts_where_they_lie(name: str) -> None:
    torch.manual_seed(3)
    mix, rules = MIXES[name]
    net, x = Block(mix).eval(), torch.randn(WINDOWS, TOKENS, C)
    expected = net(x).detach().numpy()
    source = open_program(torch.export.export(net, (x,), strict=False))
    compiled = street.compile_model(backends.get("llvm"), street.Recipe(source, targets.native()))
    answer = relax.VirtualMachine(compiled.executable, tvm.cpu())["main"](tvm.runtime.tensor(x.numpy())).numpy()
    assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()
    assert compiled.kernels["fallback"] == rules
