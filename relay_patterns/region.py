"""What a region is: a pattern over the imported graph, and how to read a match of it.

Matching goes by structure, never by name. A match is *read* into a spec and weights in their natural layout;
`read` declines what has the form of the region but not its algebra (a convolution that is not depthwise, say).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tvm import relax
from tvm.relax.dpl import DFPattern, is_const, is_op, wildcard

from schedules.spec import KernelSpec, Tensor

Parts = Mapping[str, relax.Expr]


class Reading(NamedTuple):
    """A match: what is to be computed, of which values of the graph, and with which weights."""

    spec: KernelSpec
    inputs: tuple[relax.Expr, ...]
    weights: dict[str, np.ndarray]
    result: Callable[[relax.Expr], relax.Expr] | None = None  # the value in the graph, from what the kernel gives
    begins: tuple[relax.Expr, ...] = ()  # behind which values it is computed, where these are not its inputs


def reading(
    op: str,
    inputs: Mapping[str, relax.Expr],
    weights: Mapping[str, np.ndarray],
    out: Sequence[int],
    attrs: Mapping[str, Any] | None = None,
    epilogue: Sequence[str] = (),
    layout: str = "NCHW",
) -> Reading:
    """A match in logical form: float32, and images, which have as many axes as `layout`, as PyTorch lays them out."""

    def tensor(name: str, shape: Sequence[int]) -> Tensor:
        return Tensor(name, tuple(shape), layout=layout if len(shape) == len(layout) else "")

    spec = KernelSpec.of(
        op,
        [tensor(name, extents(expr)) for name, expr in inputs.items()],
        [Tensor(name, tuple(weight.shape)) for name, weight in weights.items()],
        [tensor("out", out)],
        attrs,
        epilogue,
    )
    return Reading(spec, tuple(inputs.values()), {name: np.ascontiguousarray(each) for name, each in weights.items()})


class Step(NamedTuple):
    """A beginning of a region: everything up to and including one operator."""

    op: str
    pattern: DFPattern


@dataclass(frozen=True)
class Region:
    """One fused block; `steps` tells how far a near miss went.

    Regions of one name are variants: written differently, computed by the same kernel.
    """

    name: str
    pattern: DFPattern
    parts: dict[str, DFPattern]
    read: Callable[[Parts], Reading | None]
    steps: tuple[Step, ...] = ()
    continues: bool = False  # its kernel may take what follows: activations, other tensors


class Conv:
    """A convolution with constant weights and a bias, in PyTorch's layout."""

    def __init__(self, data: DFPattern) -> None:
        self.weight, self.bias = is_const(), is_const()
        self.call = is_op("relax.nn.conv2d")(data, self.weight)
        self.pattern = add(self.call, self.bias)

    def parts(self, name: str) -> dict[str, DFPattern]:
        return {f"{name}.call": self.call, f"{name}.weight": self.weight, f"{name}.bias": self.bias}


def add(left: DFPattern, right: DFPattern) -> DFPattern:
    """In either order, as every model is written its own way: TVM's matcher tries both."""
    return is_op("relax.add")(left, right)


def multiply(left: DFPattern, right: DFPattern) -> DFPattern:
    """In either order."""
    return is_op("relax.multiply")(left, right)


def reshaped(data: DFPattern) -> DFPattern:
    """Whatever shape it is given on the way, or none: reshapes move nothing."""
    return is_op("relax.reshape")(data, wildcard()) | data


def softmax(scores: DFPattern, infinity: DFPattern) -> tuple[DFPattern, DFPattern]:
    """A softmax, and a safe one, which differs where all scores are minus infinity: where nothing masks, none are."""
    plain = is_op("relax.nn.softmax")(scores)
    finite = _as_type(is_op("relax.logical_not")(is_op("relax.equal")(scores, infinity)))
    no_share = is_op("relax.logical_not")(_as_type(is_op("relax.max")(finite)))
    return plain, is_op("relax.where")(no_share, is_const(), plain)


def _as_type(data: DFPattern) -> DFPattern:
    return is_op("relax.astype")(data) | data


def gelu(data: DFPattern) -> DFPattern:
    return is_op("relax.nn.gelu")(data)


def array(constant: relax.Expr) -> np.ndarray:
    return constant.value.numpy()


def extents(expr: relax.Expr) -> tuple[int, ...]:
    return tuple(int(extent) for extent in expr.ty.shape)


def is_pointwise(parts: Parts, name: str) -> bool:
    attrs = parts[f"{name}.call"].attrs
    kernel = extents(parts[f"{name}.weight"])[2:]
    plain = kernel == (1, 1) and not any(attrs.padding) and attrs.groups == 1 and list(attrs.strides) == [1, 1]
    return plain and bias(parts, name) is not None


def is_depthwise_3x3(parts: Parts, name: str) -> bool:
    """Depthwise, 3x3, same size: one pixel of zeros around, no stride, no dilation."""
    attrs = parts[f"{name}.call"].attrs
    channels, multiplier, *kernel = extents(parts[f"{name}.weight"])
    return (
        multiplier == 1
        and kernel == [3, 3]
        and attrs.groups == channels
        and list(attrs.padding) == [1, 1, 1, 1]
        and list(attrs.strides) == [1, 1]
        and list(attrs.dilation) == [1, 1]
        and bias(parts, name) is not None
    )


def pointwise_weights(parts: Parts, name: str, prefix: str) -> dict[str, np.ndarray]:
    """[in, out] and [out]."""
    weight, offset = array(parts[f"{name}.weight"])[:, :, 0, 0], bias(parts, name)
    assert offset is not None, f"{name} was not seen to be pointwise"
    return {f"{prefix}_w": np.ascontiguousarray(weight.T), f"{prefix}_b": offset}


def depthwise_weights(parts: Parts, name: str, prefix: str) -> dict[str, np.ndarray]:
    """[3, 3, channels] and [channels]."""
    weight, offset = array(parts[f"{name}.weight"])[:, 0], bias(parts, name)
    assert offset is not None, f"{name} was not seen to be depthwise"
    return {f"{prefix}_w": np.ascontiguousarray(weight.transpose(1, 2, 0)), f"{prefix}_b": offset}


def bias(parts: Parts, name: str) -> np.ndarray | None:
    """What a convolution adds to each of its channels, or None where it adds something else (an embedding, say)."""
    return per_channel(parts[f"{name}.bias"], extents(parts[f"{name}.weight"])[0])


def per_channel(constant: relax.Expr, channels: int, rank: int = 4, axis: int = 1) -> np.ndarray | None:
    """A constant with one number a channel, by its shape and the channels' axis, or None where it varies otherwise."""
    shape = extents(constant)
    whole = (1,) * (rank - len(shape)) + shape
    wanted = tuple(channels if dim == axis % rank else 1 for dim in range(rank))
    if whole not in (wanted, (1,) * rank):
        return None
    return np.ascontiguousarray(np.broadcast_to(array(constant).reshape(-1), (channels,)))


__all__ = [
    "Conv",
    "Parts",
    "Reading",
    "Region",
    "Step",
    "add",
    "array",
    "depthwise_weights",
    "extents",
    "gelu",
    "is_depthwise_3x3",
    "is_pointwise",
    "multiply",
    "per_channel",
    "pointwise_weights",
    "reading",
    "reshaped",
    "softmax",
    "wildcard",
]
