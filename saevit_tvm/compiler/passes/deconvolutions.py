"""A transposed convolution as a convolution, which there are kernels for, and a shuffle of what it gives.

With a stride of s, every s-th result sees the same places of the window: s of them side by side are s channels of a
convolution at one place of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax
from tvm.relax.dpl import is_const, is_op, wildcard

from saevit_tvm.compiler.passes.rewriting import Matched, Rule, array, rewrite, shape_of


class _Axis(NamedTuple):
    """How results along one axis are made: results s * q + r, for all r < s, of inputs q + first .. q + last."""

    stride: int
    first: int
    last: int
    taps: list[list[int | None]]  # for every r and every input, the place in the window, if it is in it
    places: int  # of q

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int, results: int) -> _Axis:
        ahead = [(r + padding) // stride for r in range(stride)]
        begin = [(r + padding) % stride for r in range(stride)]
        first = min(a - (kernel - 1 - b) // stride for a, b in zip(ahead, begin, strict=True))
        last = max(ahead)

        def tap(r: int, u: int) -> int | None:
            place = stride * (ahead[r] - u) + begin[r]
            return place if 0 <= place < kernel else None

        taps = [[tap(r, u) for u in range(first, last + 1)] for r in range(stride)]
        return cls(stride, first, last, taps, -(-results // stride))

    def spread(self, window: np.ndarray) -> np.ndarray:
        """The last axis of a window as two: r and the inputs."""
        zero = np.zeros(window.shape[:-1], window.dtype)
        rows = [np.stack([zero if i is None else window[..., i] for i in row], axis=-1) for row in self.taps]
        return np.stack(rows, axis=-2)


def _deconvolution() -> Rule:
    data, weight = wildcard(), is_const()
    pattern = is_op("relax.nn.conv2d_transpose")(data, weight)

    def replace(expr: relax.Expr, matched: Matched) -> relax.Expr:
        call, attrs = matched[pattern], matched[pattern].attrs
        above, left, _, _ = (int(each) for each in attrs.padding)
        if attrs.data_layout != "NCHW" or attrs.kernel_layout != "IOHW" or any(int(d) != 1 for d in attrs.dilation):
            return expr
        window, strides = array(matched[weight]), [int(each) for each in attrs.strides]
        n, channels, *size = shape_of(call)
        axes = [_Axis.of(*how) for how in zip(window.shape[2:], strides, (above, left), size, strict=True)]
        seen = shape_of(matched[data])[2:]
        after = [axis.places - 1 + axis.last - (extent - 1) for axis, extent in zip(axes, seen, strict=True)]
        if any(axis.first > 0 or axis.last < 0 for axis in axes) or min(after) < 0:
            return expr
        padding = [-axes[0].first, -axes[1].first, *after]
        kernel = _kernel(window, axes, int(attrs.groups))
        made = relax.op.nn.conv2d(matched[data], relax.const(kernel), padding=padding, groups=int(attrs.groups))
        (high, wide), (down, across) = (axis.places for axis in axes), (axis.stride for axis in axes)
        apart = relax.op.reshape(made, (n, channels, down, across, high, wide))
        beside = relax.op.permute_dims(apart, [0, 1, 4, 2, 5, 3])
        whole = relax.op.reshape(beside, (n, channels, high * down, wide * across))
        more = [high * down, wide * across] != size
        return relax.op.strided_slice(whole, [2, 3], [0, 0], size) if more else whole

    return pattern, replace


def _kernel(window: np.ndarray, axes: list[_Axis], groups: int) -> np.ndarray:
    """[Cin, Cout a group, h, w] as the weights of the convolution: of each channel its results side by side."""
    high, wide = axes
    within, channels = window.shape[0] // groups, window.shape[1]
    spread = wide.spread(high.spread(window.swapaxes(2, 3)).transpose(0, 1, 3, 4, 2))  # [i, o, r, u, s, v]
    apart = spread.reshape(groups, within, channels, *spread.shape[2:])
    ordered = apart.transpose(0, 2, 3, 5, 1, 4, 6)  # [group, o, r, s, i, u, v]
    return np.ascontiguousarray(ordered.reshape(-1, within, *ordered.shape[-2:]))


@tvm.ir.transform.module_pass(opt_level=0, name="Deconvolutions")
class Deconvolutions:
    """Rewrite every transposed convolution that is left when the blocks have been found."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite(mod, [_deconvolution()])
