"""Transposed convolutions of volumes: plain ones, of what was spread by the stride, with the weights turned round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv3d, pad

VOLUMES = 5  # axes


def _transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    if not transposed or x.dim() != VOLUMES:
        return NotImplemented
    for axis, step in enumerate(stride, 2):
        x = _spread(x, axis, step)
    pads: list[int] = []
    for extent, step, cut, more in zip(weight.shape[2:], dilation, padding, output_padding, strict=True):
        reach = step * (extent - 1) - cut
        pads = [reach, reach + more, *pads]
    turned = weight.flip((2, 3, 4)).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return conv3d(pad(x, pads), turned, bias, 1, 0, dilation, groups)


def _spread(x: Tensor, axis: int, step: int) -> Tensor:
    """Zeros between the numbers along an axis."""
    if step == 1:
        return x
    x = x.unsqueeze(axis + 1)
    apart = torch.cat([x, *[torch.zeros_like(x)] * (step - 1)], axis + 1).flatten(axis, axis + 1)
    return apart.narrow(axis, 0, apart.shape[axis] - step + 1)


REWRITES = {"convolution.default": _transposed}
