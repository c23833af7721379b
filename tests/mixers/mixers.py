"""Token mixers of the papers around SAEViT, each written from its description in the paper, at a small size.

A mixer that decides something (a sign, the largest few, a threshold) also says, for each token, how near the closest of
the decisions that it depends on was: there rounding may decide otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, SIZE, HEADS, WIDTH = 32, 14, 4, 8  # channels, rows and columns, heads, channels of a head


def conv_norm(inner: int, outer: int, kernel: int = 1, **how: int) -> nn.Sequential:
    padding = how.pop("padding", kernel // 2 * how.get("dilation", 1))
    return nn.Sequential(nn.Conv2d(inner, outer, kernel, padding=padding, bias=False, **how), nn.BatchNorm2d(outer))


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def picture(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, height, width)


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    """[images, heads, tokens, width]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def shares(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias, -1)


def windows(x: Tensor, size: int) -> Tensor:
    """[images, windows, tokens of a window, channels], of a picture with its channels last."""
    n, height, width, channels = x.shape
    apart = x.reshape(n, height // size, size, width // size, size, channels)
    return apart.transpose(2, 3).reshape(n, -1, size * size, channels)


def whole(x: Tensor, size: int, height: int, width: int) -> Tensor:
    apart = x.reshape(x.shape[0], height // size, width // size, size, size, -1)
    return apart.transpose(2, 3).reshape(x.shape[0], height, width, -1)


class Attention(nn.Module):
    """Plain attention of tokens, which some of the mixers have inside."""

    def __init__(self, inner: int = C, outer: int = C) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(inner, 3 * outer), nn.Linear(outer, outer)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(each) for each in self.qkv(x).chunk(3, -1))
        return self.out(joined(F.scaled_dot_product_attention(q, k, v)))


class HiLo(nn.Module):
    """LITv2: half of the heads attend inside small windows, the others to the means of the windows."""

    def __init__(self) -> None:
        super().__init__()
        self.high_qkv, self.high_out = nn.Linear(C, 3 * C // 2), nn.Linear(C // 2, C // 2)
        self.low_q, self.low_kv, self.low_out = nn.Linear(C, C // 2), nn.Linear(C, C), nn.Linear(C // 2, C // 2)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1)
        qkv = self.high_qkv(windows(pixels, 2)).reshape(n, -1, 4, 3, 2, WIDTH)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
        high = self.high_out(whole((shares(q, k) @ v).transpose(2, 3), 2, height, width))
        k, v = (split(each, 2) for each in self.low_kv(tokens(F.avg_pool2d(x, 2))).chunk(2, -1))
        low = self.low_out(joined(shares(split(self.low_q(tokens(x)), 2), k) @ v))
        return torch.cat((high, low.reshape(n, height, width, -1)), -1)


class GatedLinear(nn.Module):
    """ReGLA: linear attention of queries and keys behind ReLU, with a convolution of the values, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate = conv_norm(C, 3 * C), nn.Conv2d(C, C, 1)
        self.local, self.out = nn.Conv2d(C, C, 5, padding=2, groups=C), conv_norm(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 3, HEADS, WIDTH, -1).unbind(1)
        q, k = F.relu(q), F.relu(k)
        total = (k.sum(-1, keepdim=True) * q).sum(2, keepdim=True)
        mixed = (v @ k.transpose(-2, -1)) @ q / (total + 1e-6)
        mixed = mixed.reshape(x.shape) + self.local(v.reshape(x.shape))
        return x + self.out(mixed * F.silu(self.gate(x)))


class ConvWindow(nn.Module):
    """ECViT: convolutions make queries, keys and values, attention inside windows, and a convolution in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = (
            nn.BatchNorm2d(C),
            nn.Sequential(nn.Conv2d(C, C, 3, 1, 1, groups=C), nn.Conv2d(C, 3 * C, 1)),
        )
        self.bias, self.out = nn.Parameter(torch.empty(HEADS, 49, 49)), nn.Linear(C, C)
        self.wide, self.narrow = conv_norm(C, 2 * C), conv_norm(2 * C, C)
        self.between = conv_norm(2 * C, 2 * C, 3, groups=2 * C)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        inside = windows(self.qkv(self.norm(x)).permute(0, 2, 3, 1), 7).flatten(0, 1)
        q, k, v = (split(each) for each in inside.chunk(3, -1))
        mixed = self.out(joined(shares(q, k, self.bias) @ v))
        x = x + whole(mixed.reshape(n, -1, 49, C), 7, height, width).permute(0, 3, 1, 2)
        y = F.gelu(self.wide(x))
        return x + self.narrow(y + F.gelu(self.between(y)))


class LargeSmall(nn.Module):
    """LSNet: a large depthwise kernel looks, and predicts the small kernels that gather at each position."""

    GROUPS = 8

    def __init__(self) -> None:
        super().__init__()
        kernels = C // self.GROUPS
        self.reduce, self.look = conv_norm(C, C // 2), conv_norm(C // 2, C // 2, 7, groups=C // 2)
        self.mix, self.predict = conv_norm(C // 2, C // 2), nn.Conv2d(C // 2, 9 * kernels, 1)
        self.norm, self.after = nn.GroupNorm(kernels, 9 * kernels), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        seen = F.relu(self.mix(self.look(F.relu(self.reduce(x)))))
        kernels = self.norm(self.predict(seen)).reshape(n, 1, -1, 9, height * width)
        around = F.unfold(x, 3, padding=1).reshape(n, self.GROUPS, -1, 9, height * width)
        return x + self.after((around * kernels).sum(3).reshape(x.shape))


class Binary(nn.Module):
    """A linear layer of signs, with a scale for each row, and a PReLU that is shifted before and after."""

    def __init__(self, inner: int = C, outer: int = C) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.empty(outer, inner)), nn.Parameter(torch.empty(inner))
        self.before, self.slope, self.after = (nn.Parameter(torch.empty(outer)) for _ in range(3))

    def forward(self, signs: Tensor) -> Tensor:
        scale = self.weight.abs().mean(1, keepdim=True)
        y = F.linear(signs, scale * torch.sign(self.weight)) + self.before
        return torch.where(y > 0, y, self.slope * y) + self.after


class BinaryAttention(nn.Module):
    """BHViT: attention of signs, the shares of which are all or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.edges = nn.Parameter(torch.empty(C)), nn.Parameter(torch.empty(3, C))
        self.q, self.k, self.v, self.out = (Binary() for _ in range(4))
        self.level = nn.Parameter(torch.empty(HEADS, 1, 1))

    def mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        given = tokens(x) + self.shift
        signs = torch.sign(given)
        parts = [part(signs) + edge for part, edge in zip((self.q, self.k, self.v), self.edges, strict=True)]
        q, k, v = (split(torch.sign(each)) for each in parts)
        level = 0.05 * torch.sigmoid(self.level)
        share = shares(q, k) / level
        mixed = joined(level * (torch.round(share.clamp(0, 1)) @ v))
        answer = self.out(torch.sign(mixed - 0.02 * self.shift)) + tokens(x)
        # Signs of keys and values reach every token; shares and the last signs their own.
        everywhere = torch.stack([each.abs().amin((1, 2)) for each in (given, *parts)]).amin(0)
        own = torch.minimum((share - 0.5).abs().amin((1, 3)), (mixed - 0.02 * self.shift).abs().amin(-1))
        return answer, torch.minimum(everywhere[:, None], own)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)[0]


class Inception(nn.Module):
    """iiANET: global attention with registers, a dilated convolution and a bottleneck side by side; channels gated."""

    def __init__(self) -> None:
        super().__init__()
        self.registers, self.attention = nn.Parameter(torch.empty(1, 4, C)), Attention()
        self.dilated, self.fuse = conv_norm(C, C, 3, dilation=2), conv_norm(3 * C, C)
        self.wide, self.middle = conv_norm(C, 2 * C), conv_norm(2 * C, 2 * C, 3, groups=2 * C)
        self.narrow, self.channels = conv_norm(2 * C, C), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        together = torch.cat((self.registers.expand(x.shape[0], -1, -1), tokens(x)), 1)
        seen = picture(self.attention(together)[:, 4:], *x.shape[2:])
        near = self.narrow(F.silu(self.middle(F.silu(self.wide(x)))))
        y = self.fuse(torch.cat((seen, F.silu(self.dilated(x)), near), 1))
        gate = torch.sigmoid(self.channels(y.mean((2, 3))[:, None]))
        return x + y * gate.transpose(1, 2)[..., None]


class Pyramid(nn.Module):
    """ViTAEv2: dilated convolutions of four rates halve a picture; its tokens attend, beside plain convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.ModuleList(nn.Conv2d(C, C // 2, 3, 2, rate, rate) for rate in (1, 2, 3, 4))
        self.norm, self.attention = nn.LayerNorm(2 * C), Attention(2 * C)
        self.first, self.second = conv_norm(C, C, 3, stride=2), conv_norm(C, C, 3)
        self.third, self.last = nn.Conv2d(C, C, 3, padding=1), nn.LayerNorm(C)
        self.wide, self.narrow = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        reduced = torch.cat([F.gelu(rate(x)) for rate in self.rates], 1)
        near = self.third(F.silu(self.second(F.silu(self.first(x)))))
        y = self.attention(self.norm(tokens(reduced))) + tokens(near)
        return y + self.narrow(F.gelu(self.wide(self.last(y))))


class Frequencies(nn.Module):
    """FMViT: a few channels attend to means, the others keep what the means leave, and both are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.attention = conv_norm(C, C), Attention()
        self.high, self.point = conv_norm(C, C, 3, groups=4), conv_norm(C, C)
        self.wide, self.narrow = nn.Conv2d(2 * C, 3 * C, 1), nn.Conv2d(3 * C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = F.avg_pool2d(self.low(x), 2)
        seen = picture(self.attention(tokens(means)), *means.shape[2:])
        low = F.interpolate(seen, scale_factor=2, mode="bilinear", align_corners=False)
        fine = x - F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)
        high = F.relu(self.high(fine)).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return x + self.narrow(F.relu(self.wide(torch.cat((low, self.point(high)), 1))))


class Slots(nn.Module):
    """GLMix: convolutions on the grid, beside attention among a few slots that positions are softly given to."""

    def __init__(self) -> None:
        super().__init__()
        self.local, self.point = nn.Conv2d(C, C, 5, padding=2, groups=C), conv_norm(C, C)
        self.attention, self.sharp, self.out = Attention(), nn.Parameter(torch.empty(1)), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        every, slots = tokens(x), tokens(F.adaptive_avg_pool2d(x, 5))
        alike = F.normalize(every, dim=-1) @ F.normalize(slots, dim=-1).transpose(1, 2)
        share = torch.softmax(alike * self.sharp.clamp(max=3.0).exp() * 4.0, -1)
        slots = share.transpose(1, 2) @ every / share.sum(1)[..., None]
        seen = picture(share @ self.attention(slots), *x.shape[2:])
        return self.out(seen + self.point(F.gelu(self.local(x))))


class HeadRouter(nn.Module):
    """MoH: each token takes two heads that all have, and the best two of six others, each with its weight."""

    SHARED, ROUTED, TAKEN = 2, 6, 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.shared, self.routed, self.kinds = (
            nn.Linear(C, count, bias=False) for count in (self.SHARED, self.ROUTED, 2)
        )

    def mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        every = tokens(x)
        q, k, v = (split(each, self.SHARED + self.ROUTED) for each in self.qkv(every).chunk(3, -1))
        gates = torch.softmax(self.routed(every), -1)
        best, place = gates.topk(self.TAKEN + 1, -1)
        chosen = torch.zeros_like(gates).scatter(-1, place[..., : self.TAKEN], 1.0) * gates
        chosen = self.TAKEN * chosen / chosen.sum(-1, keepdim=True).clamp(min=1e-6)
        kinds = 2 * torch.softmax(self.kinds(every), -1)
        common = self.SHARED * torch.softmax(self.shared(every), -1)
        weight = torch.cat((common * kinds[..., :1], chosen * kinds[..., 1:]), -1)
        mixed = (shares(q, k) @ v).transpose(1, 2) * weight[..., None]
        return self.out(mixed.flatten(2)), best[..., -2] - best[..., -1]

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)[0]


class SpectralGate(nn.Module):
    """SpectFormer: a complex weight for each frequency of each channel, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(C), nn.LayerNorm(C)
        self.gate = nn.Parameter(torch.empty(SIZE, SIZE // 2 + 1, C, 2))
        self.wide, self.narrow = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        waves = torch.fft.rfft2(self.norm(pixels), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.gate)
        mixed = torch.fft.irfft2(waves, s=x.shape[2:], dim=(1, 2), norm="ortho")
        return pixels + self.narrow(F.gelu(self.wide(self.last(mixed))))


class SparseMask(nn.Module):
    """Sparsifiner: a product of low rank predicts which keys each query attends to, and only these are softmaxed."""

    RANK, KEPT = 12, 20

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.down, self.up = (
            nn.Linear(SIZE * SIZE, self.RANK, bias=False),
            nn.Linear(self.RANK, SIZE * SIZE, bias=False),
        )

    def mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (split(each) for each in self.qkv(tokens(x)).chunk(3, -1))
        few = self.down(k.transpose(-2, -1)).transpose(-2, -1)
        wanted = self.up(self.RANK * shares(q, few))
        best = wanted.topk(self.KEPT + 1, -1)[0]
        mask = wanted >= best[..., -2:-1]
        scores = (q @ k.transpose(-2, -1)) * WIDTH**-0.5
        share = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
        return self.out(joined(share @ v)), (best[..., -2] - best[..., -1]).amin(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)[0]


class Strip(nn.Module):
    """S2AFormer: queries and keys of one channel a head, keys and values of a halved picture."""

    def __init__(self) -> None:
        super().__init__()
        self.local, self.reduce = conv_norm(C, C, 3, groups=C), conv_norm(C, C, 2, stride=2, groups=C, padding=0)
        self.q, self.k, self.v = nn.Linear(C, HEADS), nn.Linear(C, HEADS), nn.Linear(C, C)
        self.norm, self.out = nn.LayerNorm(C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.local(x))
        few = self.norm(tokens(self.reduce(x)))
        mixed = shares(split(self.q(tokens(x))), split(self.k(few))) @ split(self.v(few))
        return tokens(x) + self.out(joined(mixed))


class ShiftedNeighbours(nn.Module):
    """TiC: attention to the neighbours of a position, after groups of channels were shifted round four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Conv2d(C, C, 1), nn.Conv2d(C, 2 * C, 1), conv_norm(C, C)
        self.bias = nn.Parameter(torch.empty(HEADS, 9, 1))

    def forward(self, x: Tensor) -> Tensor:
        ways = ((1, 0), (-1, 0), (0, 2), (0, -2))
        moved = torch.cat([part.roll(way, (2, 3)) for part, way in zip(x.chunk(4, 1), ways, strict=True)], 1)
        near = F.unfold(self.kv(moved), 3, padding=1).reshape(x.shape[0], 2, HEADS, WIDTH, 9, -1)
        q = self.q(x).reshape(x.shape[0], HEADS, WIDTH, 1, -1)
        share = torch.softmax((q * near[:, 0]).sum(2) * WIDTH**-0.5 + self.bias, 2)
        return x + self.out((share[:, :, None] * near[:, 1]).sum(3).reshape(x.shape))


class HeadTokens(nn.Module):
    """DHVT: a token for each head, from the mean of its channels, attends with the others and goes to the class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places = nn.Parameter(torch.empty(1, 1, C)), nn.Parameter(torch.empty(1, HEADS, C))
        self.project, self.norm, self.attention = nn.Linear(WIDTH, C), nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor) -> Tensor:
        every = torch.cat((self.first.expand(x.shape[0], -1, -1), tokens(x)), 1)
        means = self.project(every.unflatten(-1, (HEADS, WIDTH)).mean(1)).unflatten(-1, (HEADS, WIDTH))
        heads = F.gelu(self.norm(means)).flatten(2) + self.places
        mixed = self.attention(torch.cat((every, heads), 1))
        known, pixels, heads = mixed.split([1, every.shape[1] - 1, HEADS], 1)
        return every + torch.cat((known + heads.mean(1, keepdim=True), pixels), 1)


class Subspaces(nn.Module):
    """ULSAM: each group of channels has one map of attention of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 1, groups=WIDTH) for _ in range(HEADS))
        self.point = nn.ModuleList(nn.Conv2d(WIDTH, 1, 1) for _ in range(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for part, deep, point in zip(x.chunk(HEADS, 1), self.deep, self.point, strict=True):
            scores = point(F.max_pool2d(deep(part), 3, 1, 1))
            share = torch.softmax(scores.flatten(2), -1).reshape(scores.shape)
            found.append(part + share.expand_as(part) * part)
        return torch.cat(found, 1)


class Axial(nn.Module):
    """Axial attention: along every row, then along every column, with embeddings of how far apart two pixels are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Conv2d(C, 3 * C, 1, bias=False) for _ in range(2))
        self.apart, self.norm = nn.Parameter(torch.empty(2, 2 * SIZE - 1, WIDTH)), nn.BatchNorm2d(C)
        places = torch.arange(SIZE)
        self.register_buffer("places", places[:, None] - places + SIZE - 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for qkv, apart, axis in zip(self.qkv, self.apart, (3, 2), strict=True):
            lines = qkv(y).unflatten(1, (3, HEADS, WIDTH)).movedim(axis + 2, -1)  # [n, 3, heads, width, other, along]
            q, k, v = lines.permute(1, 0, 4, 2, 5, 3)
            scores = q @ k.transpose(-2, -1) + torch.einsum("nlhid,ijd->nlhij", q, apart[self.places])
            mixed = torch.softmax(scores, -1) @ v  # [n, other, heads, along, width]
            y = mixed.permute(0, 2, 4, 1, 3).flatten(1, 2)
            y = y if axis == 3 else y.transpose(2, 3)
        return F.relu(self.norm(y) + x)


class SharedConv(nn.Module):
    """ConvShareViT: a token is a small picture, and one kernel for all tokens takes the place of each linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.empty(4, 1, 1, 7, 7))
        self.scales = nn.Parameter(torch.empty(4))

    def shared(self, x: Tensor, which: int) -> Tensor:
        kernel = self.kernels[which].expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, padding=3, groups=x.shape[1]) + self.scales[which]

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, :, :12, :12].unflatten(2, (3, 4)).unflatten(4, (3, 4))  # 32 maps of 3 x 3 patches of 4 x 4
        small = patches.permute(0, 1, 2, 4, 3, 5).reshape(x.shape[0], -1, 4, 4)
        q, k, v = (self.shared(small, which).flatten(2) for which in range(3))
        mixed = (torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v).reshape(small.shape)
        return small + F.relu(self.shared(mixed, 3))


class KeyGroups(nn.Module):
    """KDGQA: queries share a few keys and values, and a group has more of them the longer its keys are."""

    QUERIES, GROUPS = 8, 3

    def __init__(self) -> None:
        super().__init__()
        wide = C // self.QUERIES * self.GROUPS
        self.q, self.k, self.v, self.out = nn.Linear(C, C), nn.Linear(C, wide), nn.Linear(C, wide), nn.Linear(C, C)

    def mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        every = tokens(x)
        q, k, v = (
            split(self.q(every), self.QUERIES),
            split(self.k(every), self.GROUPS),
            split(self.v(every), self.GROUPS),
        )
        length = torch.linalg.vector_norm(k, dim=(2, 3))
        edges = (length / length.sum(1, keepdim=True)).cumsum(1)[:, :-1]
        middle = (torch.arange(self.QUERIES) + 0.5) / self.QUERIES
        group = (middle[None, :, None] > edges[:, None]).sum(-1)
        k, v = (each.gather(1, group[..., None, None].expand(q.shape)) for each in (k, v))
        near = (middle[None, :, None] - edges[:, None]).abs().amin((1, 2))
        return self.out(joined(shares(q, k) @ v)), near[:, None].expand(every.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x)[0]


MIXERS = {
    "HiLo attention": HiLo,
    "gated linear attention": GatedLinear,
    "convolution and window attention": ConvWindow,
    "large-small convolution": LargeSmall,
    "binary attention": BinaryAttention,
    "dilated convolution beside attention": Inception,
    "pyramid reduction": Pyramid,
    "mixed frequencies": Frequencies,
    "convolution beside slots": Slots,
    "mixture of heads": HeadRouter,
    "spectral gate": SpectralGate,
    "predicted sparse mask": SparseMask,
    "strip attention": Strip,
    "shifted neighbours": ShiftedNeighbours,
    "head tokens": HeadTokens,
    "subspace attention": Subspaces,
    "axial attention": Axial,
    "shared convolution": SharedConv,
    "key-driven groups": KeyGroups,
}


def made(name: str) -> nn.Module:
    """With weights and statistics that are not trivial."""
    net, random = MIXERS[name]().eval(), torch.Generator().manual_seed(5)
    for key, value in net.state_dict().items():
        if value.is_floating_point():
            matrix = key.endswith("weight") and value.dim() > 1
            value.normal_(0.0, value[0].numel() ** -0.5 if matrix else 0.4, generator=random)
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
            elif key.endswith("weight") and not matrix:
                value.add_(1.0)
    return net
