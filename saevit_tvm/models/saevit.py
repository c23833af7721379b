"""SAEViT: sparsely aggregated attention + channel-interactive FFN + depthwise separable convolutions.

After SAEViT, arXiv 2508.16884. Only its abstract was available when this was written: the network is a
reconstruction that meets the published sizes, 0.8 and 1.3 G multiply-accumulates at 224 x 224.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 16
SAMPLING_RATES = (8, 4, 2, 1)  # by stage: an input of 224 gives 49 tokens in each
# A border window is only partly filled; the rest of it must get no share in the softmax (and fit float16).
NO_SHARE = -1e4


class DropPath(nn.Module):
    """Drops a whole residual branch for some samples while training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep) / keep


class ConvNorm(nn.Sequential):
    """A convolution that BatchNorm follows, so that it needs no bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


class DWSConv(nn.Module):
    """Depthwise separable convolution: the local branch of a block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(dim, dim, 3, groups=dim)
        self.pointwise = ConvNorm(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(F.gelu(self.depthwise(x)))


class SAA(nn.Module):
    """Sparsely aggregated attention: a window becomes one token, the tokens attend, and spread out again."""

    def __init__(self, dim: int, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.heads = dim // HEAD_WIDTH
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if rate > 1:
            # No bias: a softmax does not see it.
            self.saliency = nn.Conv2d(dim, 1, 3, padding=1, bias=False)
            self.recover = nn.ConvTranspose2d(dim, dim, rate, rate, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        _, dim, height, width = x.shape
        y = self.norm(x.permute(0, 2, 3, 1))
        if self.rate == 1:
            tokens = self.attend(y.reshape(-1, height * width, dim))
            return tokens.reshape(-1, height, width, dim).permute(0, 3, 1, 2)
        rows, columns = -(-height // self.rate), -(-width // self.rate)
        tokens = self.attend(self.aggregate(y, rows, columns))
        spread = self.recover(tokens.reshape(-1, rows, columns, dim).permute(0, 3, 1, 2))
        return spread if spread.shape == x.shape else spread[:, :, :height, :width]

    def aggregate(self, y: Tensor, rows: int, columns: int) -> Tensor:
        """NHWC to one token a window: the mean of the window, weighted by the softmax of its saliency."""
        _, height, width, _ = y.shape
        saliency = self.saliency(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        below, right = rows * self.rate - height, columns * self.rate - width
        if below or right:
            y = F.pad(y, (0, 0, 0, right, 0, below))
            saliency = F.pad(saliency, (0, 0, 0, right, 0, below), value=NO_SHARE)
        share = self.windows(saliency, rows, columns).softmax(dim=2)
        return (share * self.windows(y, rows, columns)).sum(dim=2)

    def windows(self, y: Tensor, rows: int, columns: int) -> Tensor:
        """(batch, height, width, channels) to (batch, windows, positions, channels)."""
        split = y.reshape(-1, rows, self.rate, columns, self.rate, y.shape[-1])
        return split.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, self.rate**2, y.shape[-1])

    def attend(self, tokens: Tensor) -> Tensor:
        """Multi-head attention over (batch, tokens, channels)."""
        _, count, dim = tokens.shape
        parts = self.qkv(tokens).chunk(3, dim=-1)
        query, key, value = (p.reshape(-1, count, self.heads, HEAD_WIDTH).transpose(1, 2) for p in parts)
        scores = query @ key.transpose(2, 3) * HEAD_WIDTH**-0.5
        mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(-1, count, dim))


class CIFFN(nn.Module):
    """Channel-interactive feed-forward: each channel moves away from what all of them share."""

    def __init__(self, dim: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = expansion * dim
        self.norm = nn.BatchNorm2d(dim)
        self.expand = nn.Conv2d(dim, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.decompose = nn.Conv2d(hidden, 1, 1)
        self.gain = nn.Parameter(torch.zeros(1, hidden, 1, 1))
        self.reduce = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = F.gelu(self.depthwise(self.expand(self.norm(x))))
        z = z + self.gain * (z - F.gelu(self.decompose(z)))
        return self.reduce(z)


class Block(nn.Module):
    """DWSConv, SAA, CIFFN, each residual."""

    def __init__(self, dim: int, rate: int, drop_path: float) -> None:
        super().__init__()
        self.dwsconv = DWSConv(dim)
        self.saa = SAA(dim, rate)
        self.ciffn = CIFFN(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.dwsconv(x))
        x = x + self.drop_path(self.saa(x))
        return x + self.drop_path(self.ciffn(x))


class SAEViT(nn.Module):
    """Images to logits, or with `features_only` to the maps of the four stages (strides 4, 8, 16, 32)."""

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        features_only: bool = False,
        drop_path: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.dims, self.depths = tuple(dims), tuple(depths)
        self.num_classes, self.features_only = num_classes, features_only
        self.stem = nn.Sequential(
            ConvNorm(in_chans, dims[0] // 2, 3, stride=2),
            nn.GELU(),
            ConvNorm(dims[0] // 2, dims[0], 3, stride=2),
        )
        drop_rates = iter(drop_path * block / max(1, sum(depths) - 1) for block in range(sum(depths)))
        self.stages = nn.ModuleList()
        for stage, (dim, depth, rate) in enumerate(zip(dims, depths, SAMPLING_RATES, strict=True)):
            layers: list[nn.Module] = [ConvNorm(dims[stage - 1], dim, 3, stride=2)] if stage else []
            layers += [Block(dim, rate, next(drop_rates)) for _ in range(depth)]
            self.stages.append(nn.Sequential(*layers))
        if not features_only:
            self.norm = nn.BatchNorm2d(dims[-1])
            self.head = nn.Linear(dims[-1], num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps) if self.features_only else self.head(self.norm(x).mean(dim=(2, 3)))


def _initialise(layer: nn.Module) -> None:
    """Unit variance through every layer; a window's token at first returns to all its positions alike."""
    if isinstance(layer, nn.ConvTranspose2d):
        nn.init.ones_(layer.weight)
    elif isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d, nn.Linear)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


VARIANTS: dict[str, Callable[..., SAEViT]] = {}


def register(variant: Callable[..., SAEViT]) -> Callable[..., SAEViT]:
    VARIANTS[variant.__name__] = variant
    return variant


@register
def saevit_micro(**options) -> SAEViT:
    """For tests, and for pictures as simple as digits."""
    return SAEViT((16, 32, 48, 64), (1, 1, 1, 1), **options)


@register
def saevit_xs(**options) -> SAEViT:
    """The smaller of the published sizes."""
    return SAEViT((48, 96, 192, 320), (1, 2, 4, 2), **options)


@register
def saevit_s(**options) -> SAEViT:
    """The larger of the published sizes."""
    return SAEViT((48, 96, 240, 384), (1, 2, 6, 2), **options)
