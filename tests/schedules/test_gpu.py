"""The GPU kernels of every region against PyTorch, run for real by an OpenCL driver (PoCL).

PoCL has no arithmetic in float16. What the kernels of Mali compute in it runs here as loops of this CPU, whose
compiler rounds every step alike; and clang's OpenCL front end reads all of it.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch.nn import functional as F

from saevit_tvm.runtime import opencl
from schedules.activations import ACTIVATIONS, reference
from schedules.dtypes import stored_as
from schedules.gpu.epilogue import BIAS_GELU, BIAS_RESIDUAL, PLANE
from schedules.gpu.fused.saa import Attend, Recover, Sample
from schedules.gpu.fused.saa_batch import BatchSample, Mix, Normalise, Spread
from schedules.gpu.launch import Launches
from schedules.gpu.plan import accepts, plan
from schedules.gpu.primitives.attention import Attention
from schedules.gpu.primitives.cast import Cast
from schedules.gpu.primitives.conv import Conv
from schedules.gpu.primitives.depthwise import Depthwise
from schedules.gpu.primitives.fragments import ARITHMETICS
from schedules.gpu.primitives.head import Head
from schedules.gpu.primitives.linear import Linear
from schedules.gpu.primitives.norm import GroupNorm, LayerNorm
from schedules.gpu.primitives.pool import Mean, Pool
from schedules.gpu.primitives.reduce import CommonPart
from schedules.gpu.primitives.softmax import Softmax
from schedules.gpu.primitives.tensor_conv import TensorConv
from schedules.gpu.primitives.tensor_linear import TensorLinear
from schedules.gpu.registry import KERNELS, chosen_tiling, declare, expand, kernel_of, tilings
from schedules.kernels import declare as declare_spec
from schedules.kernels import tiled
from schedules.machines.gpus import CUDA_LIMITS, GENERIC, GPUS, LIMITS, Limits
from schedules.spec import BY_CHANNEL, Epilogue, KernelSpec, Tensor

# As on Adreno: local memory that is worth using, tiles for many registers. But PoCL has no arithmetic in float16.
LOCAL = dataclasses.replace(LIMITS["adreno"], half=False)
# The same kernels for a driver that has neither float16 nor tensor cores.
NVIDIA = dataclasses.replace(CUDA_LIMITS["sm_80"], half=False, tensor_cores=())
RESIDUAL_RELU = Epilogue(("bias", "add residual", "relu"))
SAME = (1, 1, 1, 1)  # what a 3x3 kernel pads
TARGET = {"kind": "opencl", "host": {"kind": "llvm"}}
TOLERANCE = {"float32": 2e-5, "float16": 5e-3}
on_a_device = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Numbers of a size that keeps sums near one."""
    random = np.random.RandomState(0)
    return {name: (random.standard_normal(shape) * 0.3).astype("float32") for name, shape in shapes.items()}


def image(*shape: int) -> np.ndarray:
    return np.random.RandomState(1).standard_normal(shape).astype("float32") + 0.5


def logical(
    op: str, x: tuple[int, ...], given: dict[str, np.ndarray], out: tuple[int, ...] = (), steps: str = "", **attrs: Any
) -> KernelSpec:
    """A spec as a pattern writes it; the result is like x where nothing else is said, and operands are like it."""
    epilogue = Epilogue(tuple(step for step in steps.split(", ") if step))
    layout = "" if op == "linear" else "NCHW"
    constants = [Tensor(name, value.shape) for name, value in given.items()]
    result = Tensor("out", out or x, layout=layout if len(out or x) == 4 else "")
    shapes = {name: (*result.shape[:2], 1, 1) if name.startswith(PLANE) else result.shape for name in epilogue.operands}
    read = [dataclasses.replace(result, name=name, shape=shape) for name, shape in shapes.items()]
    return KernelSpec.of(op, [Tensor("x", x, layout=layout), *read], constants, [result], attrs, epilogue.steps)


def compiled(lowered: Launches, limits: Limits, chance: random.Random | None = None) -> Any:
    """A library of the launches, k0, k1, and so on; by chance with other tilings than the default."""
    import tvm

    from saevit_tvm.backends.opencl import generating_kernels

    def tiling(kernel: Any) -> dict[str, int] | None:
        return dataclasses.asdict(chance.choice(kernel.tilings(limits))) if chance else None

    functions = {
        f"k{i}": launch.kernel.generated(limits, tiling(launch.kernel)).with_attr("global_symbol", f"k{i}")
        for i, launch in enumerate(lowered.launches)
    }
    with generating_kernels(limits):
        return tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(TARGET))


def compute(
    lowered: Launches,
    x: np.ndarray,
    folder: Path,
    limits: Limits,
    chance: random.Random | None = None,
    **operands: np.ndarray,
) -> np.ndarray:
    """Run the launches one after the other on the first OpenCL device."""
    import tvm

    opencl.activate()
    device = tvm.runtime.device("opencl", 0)
    path = folder / f"{len(list(folder.iterdir()))}.so"
    compiled(lowered, limits, chance).export_library(str(path))
    module = tvm.runtime.load_module(str(path))
    values: dict[str, Any] = {name: tvm.runtime.tensor(value, device) for name, value in lowered.constants.items()}
    first = lowered.launches[0]
    types = {name: buffer.dtype for name, buffer in zip(first.reads, first.kernel.reads.values(), strict=True)}
    for name, value in {"x": x, **operands}.items():
        values[name] = tvm.runtime.tensor(value.astype(types[name]), device)
    for i, launch in enumerate(lowered.launches):
        # It starts as NaN, so that gaps show.
        out = launch.kernel.out
        values[launch.writes] = tvm.runtime.tensor(np.full(out.extents, np.nan, out.dtype), device)
        module[f"k{i}"](*(values[name] for name in (*launch.reads, launch.writes)))
    return values["out"].numpy()


def agree(
    spec: KernelSpec,
    given: dict[str, np.ndarray],
    x: np.ndarray,
    expected: torch.Tensor,
    folder: Path,
    limits: Limits = GENERIC,
    dtype: str = "float32",
    chance: random.Random | None = None,
    **operands: np.ndarray,
) -> Launches:
    lowered = plan(spec, given, limits, dtype)
    assert lowered is not None and accepts(spec, limits)
    within(TOLERANCE[dtype], compute(lowered, x, folder, limits, chance, **operands), expected)
    return lowered


def within(tolerance: float, found: np.ndarray, expected: torch.Tensor) -> None:
    wanted = expected.numpy()
    assert np.abs(found.astype("float64") - wanted).max() / max(1.0, np.abs(wanted).max()) < tolerance


def doubles(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value).double() for name, value in values.items()}


# What the regions compute --------------------------------------------------------


def saa(x: torch.Tensor, w: dict[str, torch.Tensor], heads: int, r: int, eps: float, scale: float) -> torch.Tensor:
    n, c, height, width = x.shape
    y = F.layer_norm(x.permute(0, 2, 3, 1), (c,), w["ln_g"], w["ln_b"], eps)
    rows, columns = -(-height // r), -(-width // r)
    tokens = y.reshape(n, -1, c)
    if r > 1:
        saliency = F.conv2d(y.permute(0, 3, 1, 2), w["sal_w"].permute(2, 0, 1)[None], padding=1)
        saliency = saliency + w["sal_b"].expand(r, r).repeat(rows, columns)[:height, :width]
        beyond = (0, columns * r - width, 0, rows * r - height)
        saliency, y = F.pad(saliency, beyond, value=-1e30), F.pad(y, (0, 0, *beyond))

        def windows(z: torch.Tensor) -> torch.Tensor:
            split = z.reshape(n, rows, r, columns, r, -1).permute(0, 1, 3, 2, 4, 5)
            return split.reshape(n, rows * columns, r * r, -1)

        share = windows(saliency.permute(0, 2, 3, 1)).softmax(2)
        tokens = (share * windows(y)).sum(2)
    query, key, value = (
        part.reshape(n, -1, heads, c // heads).transpose(1, 2)
        for part in (tokens @ w["qkv_w"] + w["qkv_b"]).chunk(3, -1)
    )
    mixed = ((query @ key.transpose(2, 3) * scale).softmax(-1) @ value).transpose(1, 2).reshape(n, -1, c)
    spread = (mixed @ w["pr_w"] + w["pr_b"]).reshape(n, rows, columns, c).permute(0, 3, 1, 2)
    if r > 1:
        spread = F.conv_transpose2d(spread, w["up_w"].permute(2, 0, 1)[:, None], w["up_b"], r, groups=c)
    return x + spread[:, :, :height, :width]


def depthwise(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.gelu(F.conv2d(x, w["dw_w"].permute(2, 0, 1)[:, None], w["dw_b"], padding=1, groups=x.shape[1]))


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight.T[:, :, None, None], bias)


# Against PyTorch ------------------------------------------------------------------


@pytest.mark.slow
@on_a_device
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "heads", "r", "by_position", "dtype"),
    [
        (1, 9, 6, 20, 2, 3, True, "float32"),
        (2, 7, 9, 16, 1, 4, False, "float32"),  # partly filled windows below and on the right
        (1, 14, 14, 20, 2, 2, True, "float32"),  # strips of three windows, the last of one
        (2, 7, 7, 64, 4, 1, False, "float32"),
        (1, 16, 8, 32, 2, 8, False, "float16"),
    ],
)
def test_saa(n: int, h: int, w: int, c: int, heads: int, r: int, by_position: bool, dtype: str, folder: Path) -> None:
    lowered = agree(*saa_case(n, h, w, c, heads, r, by_position), folder, dtype=dtype)
    assert len(lowered.launches) == (3 if r > 1 else 2)


@pytest.mark.slow
@on_a_device
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "heads", "r", "by_position", "limits", "dtype"),
    [
        (5, 3, 7, 20, 2, 1, False, GENERIC, "float32"),  # 105 columns: the last work-groups are partly filled
        (4, 9, 6, 20, 2, 2, True, LOCAL, "float32"),  # 60 columns, which four work-items a load share
        (5, 13, 12, 16, 1, 8, False, GENERIC, "float16"),
        (4, 5, 4, 32, 2, 1, False, LOCAL, "float16"),
        (5, 7, 7, 48, 3, 1, False, NVIDIA, "float16"),
        (4, 11, 20, 32, 2, 8, True, NVIDIA, "float16"),
        (4, 9, 8, 24, 3, 2, False, NVIDIA, "float32"),
    ],
)
def test_saa_of_a_batch(
    n: int,
    h: int,
    w: int,
    c: int,
    heads: int,
    r: int,
    by_position: bool,
    limits: Limits,
    dtype: str,
    folder: Path,
) -> None:
    lowered = agree(*saa_case(n, h, w, c, heads, r, by_position), folder, limits, dtype)
    assert names(lowered) == in_batch(r, "conv")


def names(lowered: Launches) -> list[str]:
    return [launch.name for launch in lowered.launches]


def in_batch(r: int, conv: str) -> list[str]:
    """The launches of a batch."""
    if r == 1:
        return ["saa_normalise", conv, "saa_mix", conv]
    return ["saa_batch_sample", conv, "saa_mix", conv, "saa_spread"]


def test_few_images_take_few_launches() -> None:
    for limits, dtype in ((GENERIC, "float32"), *((CUDA_LIMITS["sm_90"], dtype) for dtype in ARITHMETICS)):
        for r, few in ((2, ["saa_sample", "saa_attend", "saa_recover"]), (1, ["saa_attend", "saa_recover"])):
            for n, expected in ((1, few), (3, few), (4, in_batch(r, "tensor_conv" if limits.tensor_cores else "conv"))):
                spec, given, _, _ = saa_case(n, 8, 8, 32, 2, r, False)
                lowered = plan(spec, given, limits, dtype)
                assert lowered is not None and names(lowered) == expected
                assert {launch.kernel.out.dtype for launch in lowered.launches} == {stored_as(dtype)}
    uneven, given = saa_weights(1, 8, 8, 32, 3, 2, False)
    assert plan(uneven, given, GENERIC) is None and not accepts(uneven, GENERIC)


@st.composite
def any_batch(draw: st.DrawFn) -> tuple[Any, ...]:
    size, heads = st.integers(1, 12), draw(st.integers(1, 3))
    n, h, w = draw(st.integers(4, 7)), draw(size), draw(size)
    r, c = draw(st.integers(1, 4)), heads * draw(st.sampled_from([3, 8, 16]))
    return n, h, w, c, heads, r, draw(st.booleans())


@pytest.mark.slow
@on_a_device
@settings(max_examples=2, deadline=None)
@drawn(
    case=any_batch(),
    limits=st.sampled_from([GENERIC, LOCAL, NVIDIA]),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0),
)
def test_any_batch(case: tuple[Any, ...], limits: Limits, dtype: str, seed: int, folder: Path) -> None:
    """With any of the tilings."""
    agree(*saa_case(*case), folder, limits, dtype, random.Random(seed))


@settings(max_examples=40, deadline=None)
@example(case=(1, 32, 32, 16, 1, 2, False), larger=1, name="adreno")  # local memory is full to the last byte
@drawn(case=any_batch(), larger=st.integers(1, 30), name=st.sampled_from([*LIMITS, *CUDA_LIMITS]))
def test_a_batch_fits_where_one_image_does(case: tuple[Any, ...], larger: int, name: str) -> None:
    """The model is cut into regions by what fits, and that must not depend on the batch."""
    _, h, w, c, heads, r, by_position = case
    limits = (LIMITS | CUDA_LIMITS)[name]
    spec, _ = saa_weights(1, larger * h, w, c, heads, r, by_position)
    if accepts(spec, limits):
        batch, given = saa_weights(8, larger * h, w, c, heads, r, by_position)
        for dtype in ("float32", "float16"):
            assert plan(batch, given, limits, dtype) is not None


@on_a_device
def test_a_softmax_of_large_numbers_is_safe(folder: Path) -> None:
    """Saliencies and scores of hundreds below and above zero, in partly filled windows too."""
    spec, given, x, _ = saa_case(1, 7, 5, 16, 2, 3, False)
    given["sal_w"] *= 100.0
    given["qkv_w"] *= 20.0
    expected = saa(torch.from_numpy(x).double(), doubles(given), 2, 3, 1e-5, 0.25)
    lowered = plan(spec, given, GENERIC)
    assert lowered is not None
    # A rounding of a score of hundreds is a visible part of its power: this is about safety, not precision.
    within(1e-2, compute(lowered, x, folder, GENERIC), expected)


def saa_case(n: int, h: int, w: int, c: int, heads: int, r: int, by_position: bool) -> tuple[Any, ...]:
    """Its spec, its weights, an image, and what PyTorch makes of it."""
    spec, given = saa_weights(n, h, w, c, heads, r, by_position)
    x = image(n, c, h, w)
    return spec, given, x, saa(torch.from_numpy(x).double(), doubles(given), heads, r, 1e-5, 0.25)


def saa_weights(n: int, h: int, w: int, c: int, heads: int, r: int, by_position: bool) -> tuple[Any, ...]:
    given = weights(ln_g=(c,), ln_b=(c,), qkv_w=(c, 3 * c), qkv_b=(3 * c,), pr_w=(c, c), pr_b=(c,))
    if r > 1:
        given |= weights(sal_w=(3, 3, c), sal_b=(r, r) if by_position else (1,), up_w=(r, r, c), up_b=(c,))
    return logical("saa", (n, c, h, w), given, heads=heads, r=r, eps=1e-5, scale=0.25), given


@pytest.mark.slow
@on_a_device
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "e", "limits", "dtype"),
    [
        (2, 10, 7, 12, 20, GENERIC, "float32"),
        (1, 8, 8, 16, 64, LOCAL, "float32"),
        (1, 7, 7, 9, 18, GENERIC, "float16"),
        (2, 10, 7, 12, 20, LOCAL, "float32"),
        (1, 12, 12, 16, 64, LOCAL, "float16"),
    ],
    ids=["generic", "local memory", "half", "images", "images of half"],
)
def test_ciffn(n: int, h: int, w: int, c: int, e: int, limits: Limits, dtype: str, folder: Path) -> None:
    agree(*ciffn_case(n, h, w, c, e), folder, limits, dtype)


def ciffn_case(n: int, h: int, w: int, c: int, e: int) -> tuple[Any, ...]:
    given = weights(ex_w=(c, e), ex_b=(e,), dw_w=(3, 3, e), dw_b=(e,), dec_w=(e,), dec_b=(1,), g=(e,))
    given |= weights(pr_w=(e, c), pr_b=(c,))
    x, exact = image(n, c, h, w), doubles(given)
    z = depthwise(pointwise(torch.from_numpy(x).double(), exact["ex_w"], exact["ex_b"]), exact)
    common = F.gelu(pointwise(z, exact["dec_w"][:, None], exact["dec_b"]))
    z = z + exact["g"][:, None, None] * (z - common)
    expected = torch.from_numpy(x).double() + pointwise(z, exact["pr_w"], exact["pr_b"])
    return logical("ciffn", x.shape, given), given, x, expected


@on_a_device
@pytest.mark.parametrize(("limits", "h", "w"), [(GENERIC, 23, 24), (NVIDIA, 29, 36)], ids=["generic", "nvidia"])
def test_dwsconv(limits: Limits, h: int, w: int, folder: Path) -> None:
    n, c = 1, 24  # positions enough for two rows a work-item, and a row too few; on NVIDIA four columns
    given = weights(dw_w=(3, 3, c), dw_b=(c,), pw_w=(c, c), pw_b=(c,))
    x, exact = image(n, c, h, w), doubles(given)
    expected = torch.from_numpy(x).double()
    expected = expected + pointwise(depthwise(expected, exact), exact["pw_w"], exact["pw_b"])
    agree(logical("dwsconv", x.shape, given), given, x, expected, folder, limits)


def finished(spec: KernelSpec, out: torch.Tensor, given: dict[str, np.ndarray], **operands: np.ndarray) -> torch.Tensor:
    """The epilogue of a spec, in float64."""
    by_channel = {name: given[name][:, None, None] if spec.x.layout else given[name] for name in "bs" if name in given}
    return torch.from_numpy(reference(spec.epilogue.steps, out.numpy(), {**by_channel, **operands}))


def by_channel(steps: str, channels: int) -> dict[str, tuple[int, ...]]:
    """The weights that an epilogue needs."""
    return {name: (channels,) for step, name in BY_CHANNEL.items() if step in steps}


def others(spec: KernelSpec) -> dict[str, np.ndarray]:
    """Numbers for the other tensors that an epilogue reads."""
    shapes = {each.name: each.shape for each in spec.inputs}
    return {name: image(*shapes[name])[::-1] for name in spec.epilogue.operands}


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution goes over an image; padding is above, left, below, right."""

    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = SAME
    dilation: tuple[int, int] = (1, 1)

    def attrs(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "kernel"}

    def over(self, x: np.ndarray, weight: torch.Tensor) -> torch.Tensor:
        """In float64; the weight as PyTorch has it."""
        above, left, below, right = self.padding
        padded = F.pad(torch.from_numpy(x).double(), (left, right, above, below))
        return F.conv2d(padded, weight, None, self.strides, 0, self.dilation, x.shape[1] // weight.shape[1])


POINT = Window((1, 1), padding=(0, 0, 0, 0))


@pytest.mark.slow
@on_a_device
@pytest.mark.parametrize(
    ("x", "k", "window", "steps", "limits", "dtype"),
    [
        # With groups: as in ResNeXt, of few channels through local memory, and of an odd number.
        (((1, 24, 7, 9), 3), 48, Window(strides=(2, 2)), "bias, relu", GENERIC, "float32"),
        (((2, 32, 6, 6), 4), 32, Window(), "bias, add residual", LOCAL, "float16"),
        (((1, 15, 5, 8), 5), 10, POINT, "bias", NVIDIA, "float32"),
        ((1, 3, 33, 18), 10, Window(strides=(2, 2)), "bias, gelu", GENERIC, "float32"),
        ((2, 8, 12, 12), 16, Window(padding=(0, 0, 0, 0)), "bias", LOCAL, "float32"),
        ((1, 6, 8, 8), 7, dataclasses.replace(POINT, strides=(2, 2)), "bias", GENERIC, "float32"),
        # As ResNet ends a block, and what there is besides: steps in any order, no bias, a gate.
        ((2, 8, 6, 6), 12, POINT, "bias, add residual, relu", GENERIC, "float32"),
        ((1, 8, 7, 5), 8, Window(), "bias, relu, add residual", LOCAL, "float32"),
        ((1, 12, 8, 8), 16, POINT, "silu, multiply gate, bias, add residual", NVIDIA, "float32"),
        ((1, 5, 6, 7), 9, Window(), "", GENERIC, "float32"),
        # Gates of one number an image and channel, and scales.
        ((2, 8, 6, 6), 12, POINT, "bias, multiply plane, relu, add plane1", GENERIC, "float32"),
        ((2, 8, 7, 5), 8, Window(), "bias, relu, scale, add residual", LOCAL, "float16"),
        ((2, 16, 4, 8), 8, POINT, "relu6, add residual", GENERIC, "float16"),
        # Kernels that are not square, uneven edges and steps, and gaps.
        ((1, 4, 9, 11), 8, Window((1, 7), (1, 2), (0, 3, 0, 2)), "bias, tanh", GENERIC, "float32"),
        ((1, 4, 12, 10), 8, Window((3, 2), (2, 1), (0, 1, 3, 0), (3, 2)), "bias, sigmoid", LOCAL, "float32"),
    ],
)
def test_conv(x: Any, k: int, window: Window, steps: str, limits: Limits, dtype: str, folder: Path) -> None:
    x, groups = x if isinstance(x[0], tuple) else (x, 1)
    given = weights(w=(*window.kernel, x[1] // groups, k), **by_channel(steps, k))
    out = window.over(image(*x), torch.from_numpy(given["w"]).double().permute(3, 2, 0, 1))
    spec = logical("conv", x, given, tuple(out.shape), steps, **window.attrs(), groups=groups)
    operands = others(spec)
    agree(spec, given, image(*x), finished(spec, out, given, **operands), folder, limits, dtype, **operands)


@pytest.mark.slow
@on_a_device
@pytest.mark.parametrize(
    ("x", "window", "steps", "limits", "dtype"),
    [
        ((2, 5, 12, 16), Window((5, 5), (2, 2), (2, 2, 2, 2)), "bias, relu6", GENERIC, "float32"),
        ((1, 4, 16, 24), Window((5, 5), (2, 2), (2, 2, 2, 2)), "bias, silu", NVIDIA, "float32"),  # loads of four
        (
            (1, 4, 14, 14),
            Window(strides=(2, 2), padding=(0, 0, 1, 1)),
            "bias, relu",
            NVIDIA,
            "float32",
        ),  # as TensorFlow pads
        ((1, 3, 9, 8), Window((7, 7), padding=(3, 3, 3, 3)), "bias", GENERIC, "float32"),
        ((1, 6, 8, 12), Window(dilation=(2, 3), padding=(2, 3, 2, 3)), "add residual, relu", NVIDIA, "float32"),
        ((2, 3, 7, 9), Window((2, 4), (1, 3), (1, 0, 0, 5)), "", LOCAL, "float32"),
        ((2, 4, 6, 8), Window(), "relu, scale, multiply plane", NVIDIA, "float32"),
        ((1, 4, 6, 6), Window((1, 1), (2, 2), (0, 0, 0, 0)), "bias, multiply gate", GENERIC, "float16"),
    ],
)
def test_depthwise(x: tuple[int, ...], window: Window, steps: str, limits: Limits, dtype: str, folder: Path) -> None:
    given = weights(w=(*window.kernel, x[1]), **by_channel(steps, x[1]))
    out = window.over(image(*x), torch.from_numpy(given["w"]).double().permute(2, 0, 1)[:, None])
    spec = logical("depthwise", x, given, tuple(out.shape), steps, **window.attrs())
    operands = others(spec)
    expected = finished(spec, out, given, **operands)
    for chance in (None, random.Random(0), random.Random(1)):
        agree(spec, given, image(*x), expected, folder, limits, dtype, chance, **operands)


@pytest.mark.slow
@on_a_device
@pytest.mark.parametrize(
    ("x", "k", "steps", "limits", "dtype"),
    [
        ((1, 49, 32), 64, "bias, gelu", GENERIC, "float32"),  # the last tile has one token
        ((2, 5, 24), 20, "bias, add residual", LOCAL, "float32"),
        ((3, 7, 9), 7, "gelu", GENERIC, "float32"),  # nothing is a multiple of four
        ((1, 32), 10, "bias", NVIDIA, "float32"),  # a single token
        ((197, 48), 24, "bias, silu, multiply gate", NVIDIA, "float32"),
        ((1, 13, 64), 32, "bias, gelu, scale", GENERIC, "float16"),
        ((2, 9, 48), 16, "bias, gelu", dataclasses.replace(LOCAL, texels=0), "float16"),
    ],
)
def test_linear(x: tuple[int, ...], k: int, steps: str, limits: Limits, dtype: str, folder: Path) -> None:
    given = weights(w=(x[-1], k), **by_channel(steps, k))
    out = torch.from_numpy(image(*x)).double() @ torch.from_numpy(given["w"]).double()
    spec = logical("linear", x, given, tuple(out.shape), steps)
    operands = others(spec)
    expected = finished(spec, out, given, **operands)
    for chance in (None, random.Random(0), random.Random(1)):
        agree(spec, given, image(*x), expected, folder, limits, dtype, chance, **operands)


@pytest.mark.slow
@on_a_device
def test_what_is_no_number_stays_none(folder: Path) -> None:
    """No activation makes a number of it, as the larger of it and zero may be on a device; nor what is infinite."""
    given = weights(w=(1, 1, 4, 4), b=(4,))
    x = image(1, 4, 4, 4)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = np.nan, np.inf, -np.inf
    out = POINT.over(x, torch.from_numpy(given["w"]).double().permute(3, 2, 0, 1))
    for activation in ACTIVATIONS:
        spec = logical("conv", x.shape, given, tuple(out.shape), f"bias, {activation}")
        lowered = plan(spec, given, GENERIC)
        assert lowered is not None
        with np.errstate(all="ignore"):
            expected = finished(spec, out, given).numpy()
        np.testing.assert_allclose(compute(lowered, x, folder, GENERIC), expected, 1e-5, 1e-5)


def test_what_there_are_no_kernels_for_is_declined() -> None:
    given = weights(w=(3, 3, 8, 16), b=(16,))

    def conv(steps: str = "bias", out: tuple[int, ...] = (1, 16, 6, 6), **attrs: Any) -> KernelSpec:
        return logical("conv", (1, 8, 6, 6), given, out, steps, **{"padding": SAME, **attrs})

    fine = conv("bias, add residual, relu")
    assert accepts(fine, GENERIC)
    small = dataclasses.replace(fine.inputs[1], shape=(1, 1, 6, 6))
    grouped = dataclasses.replace(conv(groups=2), weights=(Tensor("w", (3, 3, 2, 16)), Tensor("b", (16,))))
    for spec in (
        conv("bias, softplus"),  # an activation that nobody knows
        conv("bias, divide residual"),
        dataclasses.replace(fine, inputs=(fine.x, small)),  # a number a position
        dataclasses.replace(fine, inputs=(fine.x,)),
        grouped,
        dataclasses.replace(fine, op="convolution"),
        dataclasses.replace(fine, inputs=(fine.x.laid_out("NHWC"), fine.inputs[1])),
        dataclasses.replace(fine, inputs=(dataclasses.replace(fine.x, strides=(1, 8, 48, 8)), fine.inputs[1])),
        conv(out=(1, 16, 5, 6)),  # which is not what comes out
        logical("depthwise", (1, 8, 20, 20), weights(w=(13, 13, 8)), padding=(6, 6, 6, 6)),
        logical("linear", (1, 7, 9), weights(w=(8, 4)), (1, 7, 4)),
        logical("head", (1, 8, 3, 3), weights(w=(8, 4), b=(4,)), (1, 4), "relu"),
    ):
        assert not accepts(spec, GENERIC) and plan(spec, {}, GENERIC) is None


@st.composite
def any_primitive(draw: st.DrawFn) -> KernelSpec:
    """A convolution, depthwise or not, or a linear layer, of any size."""
    op, c, k = (
        draw(st.sampled_from(["conv", "depthwise", "linear"])),
        draw(st.integers(1, 130)),
        draw(st.integers(1, 130)),
    )
    steps = draw(
        st.lists(st.sampled_from(["bias", "scale", "add residual", "multiply gate", *ACTIVATIONS]), max_size=4)
    )
    bias = by_channel(" ".join(steps), c if op == "depthwise" else k)
    if op == "linear":
        tokens = tuple(draw(st.lists(st.integers(1, 30), max_size=3)))
        return logical(op, (*tokens, c), weights(w=(c, k), **bias), (*tokens, k), ", ".join(steps))
    side, two = st.integers(1, 40), st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, sides = draw(st.tuples(st.integers(1, 7), st.integers(1, 7))), st.integers(0, 4)
    window = Window(kernel, draw(two), draw(st.tuples(sides, sides, sides, sides)), draw(two))
    x = (draw(st.integers(1, 5)), c, draw(side), draw(side))
    shape = (*kernel, c) if op == "depthwise" else (*kernel, c, k)
    above, left, below, right = window.padding
    extents = zip(x[2:], (above + below, left + right), kernel, window.strides, window.dilation, strict=True)
    out = [(size + pads - (taps - 1) * apart - 1) // step + 1 for size, pads, taps, step, apart in extents]
    assume(min(out) > 0)
    return logical(op, x, weights(w=shape, **bias), (x[0], shape[-1], *out), ", ".join(steps), **window.attrs())


@on_a_device
@settings(max_examples=3, deadline=None)
@drawn(
    spec=any_primitive(),
    limits=st.sampled_from([GENERIC, LOCAL, NVIDIA]),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0),
)
def test_any_primitive(spec: KernelSpec, limits: Limits, dtype: str, seed: int, folder: Path) -> None:
    """With any of the tilings."""
    assume(accepts(spec, limits))
    given = weights(**{each.name: each.shape for each in spec.weights})
    given["w"] /= max(1.0, np.prod(given["w"].shape[:-1], dtype=float) ** 0.5)
    x, weight = image(*spec.x.shape), torch.from_numpy(given["w"]).double()
    if spec.op == "linear":
        out = torch.from_numpy(x).double() @ weight
    else:
        turned = weight.permute(2, 0, 1)[:, None] if spec.op == "depthwise" else weight.permute(3, 2, 0, 1)
        window = Window(given["w"].shape[:2], *(spec[name] for name in ("strides", "padding", "dilation")))
        out = window.over(x, turned)
    operands = others(spec)
    expected = finished(spec, out, given, **operands)
    agree(spec, given, x, expected, folder, limits, dtype, random.Random(seed), **operands)


@settings(max_examples=8, deadline=None)
@drawn(spec=any_primitive(), name=st.sampled_from([*LIMITS, *CUDA_LIMITS]))
def test_what_is_accepted_is_planned_in_any_arithmetic(spec: KernelSpec, name: str) -> None:
    """The graph is cut before its arithmetic is chosen. Every kernel can be declared, and generated by its default."""
    limits = (LIMITS | CUDA_LIMITS)[name]
    given = {each.name: np.zeros(each.shape, "float32") for each in spec.weights}
    if spec.epilogue.steps.count("gelu") > 1:
        assert not accepts(spec, limits)
    else:
        assert accepts(spec, limits) or spec["dilation"] != (1, 1)  # for which a row may be too long
    for dtype in ("float32", "float16", *limits.tensor_cores):
        planned = plan(spec, given, limits, dtype)
        assert (planned is not None) == accepts(spec, limits)
        for launch in planned.launches if planned else ():
            assert kernel_of(declare(launch.kernel)) == launch.kernel
            launch.kernel.generated(limits)


def test_equal_kernels_are_equal_whatever_the_graph_calls_its_values() -> None:
    given = weights(w=(1, 1, 8, 8), b=(8,))
    specs = [logical("conv", (1, 8, 6, 6), given, steps=f"bias, add {name}") for name in ("residual", "acc", "dx")]
    planned = [plan(spec, given, GENERIC) for spec in specs]
    assert len({lowered.launches[0].kernel for lowered in planned if lowered}) == 1
    assert [lowered.launches[0].reads[-1] for lowered in planned if lowered] == ["residual", "acc", "dx"]


def test_the_first_kernel_says_how_it_reads_the_input() -> None:
    """A picture of float32 is read as it is, where a convolution or a linear layer begins."""
    conv = logical("conv", (1, 8, 6, 6), weights(w=(1, 1, 8, 8), b=(8,)), steps="bias")
    linear = logical("linear", (1, 6, 8), weights(w=(8, 8), b=(8,)), steps="bias")
    depthwise = logical("depthwise", (1, 8, 6, 6), weights(w=(3, 3, 8), b=(8,)), steps="bias", padding=SAME)
    residual = dataclasses.replace(conv, epilogue=Epilogue(("bias", "add x")))
    for spec, dtype in ((conv, "float32"), (linear, "float32"), (depthwise, "float16"), (residual, "float16")):
        given = {each.name: np.zeros(each.shape, "float32") for each in spec.weights}
        lowered = plan(spec, given, LIMITS["mali"], "float16", "float32")
        assert lowered is not None and lowered.launches[0].kernel.reads["x"].dtype == dtype
        assert lowered.launches[-1].kernel.out.dtype == lowered.constants["w"].dtype == "float16"


@on_a_device
def test_head(folder: Path) -> None:
    n, h, w, c, k = 2, 3, 5, 70, 130
    given = weights(w=(c, k), b=(k,))
    x, exact = image(n, c, h, w), doubles(given)
    expected = torch.from_numpy(x).double().mean((2, 3)) @ exact["w"] + exact["b"]
    agree(logical("head", x.shape, given, (n, k)), given, x, expected, folder)


@pytest.mark.slow
@on_a_device
@pytest.mark.parametrize("seed", range(2))
def test_tilings_compute_the_same(seed: int, folder: Path) -> None:
    chance = random.Random(seed)
    agree(*saa_case(1, 10, 18, 24, 3, 4, True), folder, chance=chance)
    agree(*saa_case(1, 5, 4, 24, 3, 1, False), folder, chance=chance)
    agree(*ciffn_case(1, 8, 9, 16, 64), folder, LOCAL, chance=chance)


# Arithmetic in float16 ------------------------------------------------------------


def as_loops(kernel: Any, limits: Limits, inputs: list[np.ndarray]) -> np.ndarray:
    """What a kernel without local memory computes: its work-items one after the other, on this CPU."""
    import tvm
    from tvm.script import from_source, tirx

    text = re.sub(r"T\.thread_binding\((\d+), thread=[^)]*\)", r"range(\1)", kernel.generated(limits).script())
    assert "float16" in text and "alloc_shared" not in text
    func = from_source(text, extra_vars={"T": tirx}).with_attr("global_symbol", "kernel")
    library = tvm.compile(tvm.IRModule({"kernel": func}), target=tvm.target.Target({"kind": "llvm"})).jit()
    out = tvm.runtime.tensor(np.full(kernel.out.extents, np.nan, kernel.out.dtype))
    stored = [value.astype(buffer.dtype) for value, buffer in zip(inputs, kernel.reads.values(), strict=True)]
    library["kernel"](*map(tvm.runtime.tensor, stored), out)
    return out.numpy()


def test_a_convolution_in_float16() -> None:
    """Long sums are the danger: of 512 products, all of one sign."""
    kernel = Conv(1, 4, 4, 512, 8, epilogue=BIAS_GELU, dtype="float16", given="float16")
    x, w, b = np.abs(image(1, 512, 4, 4)), np.abs(weights(w=(512, 8))["w"]), weights(b=(8,))["b"]
    exact = F.gelu(pointwise(*(torch.from_numpy(value).double() for value in (x, w, b))))
    within(5e-3, as_loops(kernel, LIMITS["mali"], [x, w, b]), exact)


@pytest.mark.parametrize(("limits", "w"), [(LIMITS["mali"], 9), (CUDA_LIMITS["sm_80"], 12)], ids=["mali", "nvidia"])
def test_a_depthwise_convolution_in_float16(limits: Limits, w: int) -> None:
    kernel = Depthwise(1, 4, 7, w, padding=SAME, epilogue=BIAS_GELU, dtype="float16")
    given = weights(dw_w=(3, 3, 4), dw_b=(4,))
    x = image(1, 4, 7, w)
    exact = depthwise(torch.from_numpy(x).double(), doubles(given))
    within(5e-3, as_loops(kernel, limits, [x, *given.values()]), exact)


@pytest.mark.parametrize(("c", "steps"), [(512, ("bias", "gelu")), (36, ("bias", "add residual", "relu"))])
def test_a_linear_layer_in_float16(c: int, steps: tuple[str, ...]) -> None:
    kernel = Linear((2, 5), c, 8, Epilogue(steps), "float16", "float16")
    given = weights(w=(c, 8), b=(8,), residual=(2, 5, 8))
    x = np.abs(image(2, 5, c))
    out = reference(steps, x.astype("float64") @ np.abs(given["w"]), given)
    values = [x, np.abs(given["w"]), given["b"], given["residual"]][: len(kernel.reads)]
    within(5e-3, as_loops(kernel, LIMITS["mali"], values), torch.from_numpy(out))


def test_wide_loads_of_a_depthwise_convolution() -> None:
    """Where a work-item has registers for it, it loads and stores as many neighbours as always lie together."""
    for width, lanes in ((56, 4), (14, 2), (7, 1)):
        assert [Depthwise(1, 4, 28, width, padding=SAME).default(limits).wide for limits in (NVIDIA, GENERIC)] == [
            lanes,
            1,
        ]


# What differs between devices, and why --------------------------------------------


def source(name: str, dtype: str, side: int = 24) -> str:
    """The OpenCL C of a CIFFN and of the first two kernels of an SAA for a device."""
    ciffn = plan(*ciffn_case(1, side, side, 16, 64)[:2], LIMITS[name], dtype)
    saa = plan(*saa_weights(1, 7, 7, 16, 1, 1, False), LIMITS[name], dtype)
    assert ciffn is not None and saa is not None
    both = Launches([*ciffn.launches, *saa.launches], {})
    return str(compiled(both, LIMITS[name]).mod.imports[0].inspect_source())


@pytest.fixture(scope="module")
def sources() -> dict[tuple[str, str], str]:
    return {
        (name, dtype): source(name, dtype)
        for name, dtype in [
            ("mali", "float32"),
            ("adreno", "float32"),
            ("mali", "float16"),
            ("adreno", "float16"),
            ("generic-opencl", "float16"),
        ]
    }


@pytest.mark.slow
def test_only_adreno_brings_weights_to_local_memory(sources: dict[tuple[str, str], str]) -> None:
    """On Mali local memory is main memory by another name."""
    assert re.search(r"__local float near\w*\[512\]", source("adreno", "float32", side=8))
    assert not re.search(r"__local \w+ near", source("mali", "float32", side=8) + sources["mali", "float32"])


def test_only_adreno_reads_weights_through_images(sources: dict[tuple[str, str], str]) -> None:
    """Where many work-groups read them: the texture units have a cache of their own there."""
    image, local = r"__read_only image1d_buffer_t w\w* /\* of {} \*/", r"__local \w+ near"
    for dtype, word, read in (("float32", "float", "read_imagef(w"), ("float16", "half", "read_imageh(w")):
        text = sources["adreno", dtype]
        assert len(re.findall(image.format(word), text)) == 2 and read in text and not re.search(local, text)
    assert "image" not in source("adreno", "float32", side=8)
    assert not any("image" in text for (name, _), text in sources.items() if name != "adreno")


def test_tuning_decides_where_weights_come_from() -> None:
    conv = Conv(1, 14, 14, 48, 96)
    ways = {(tiling.staged, tiling.image) for tiling in conv.tilings(LIMITS["adreno"])}
    assert ways == {(0, 0), (8, 0), (4, 0), (0, 1)}
    # Weights that no image can hold, or that are not whole texels, stay buffers.
    small = dataclasses.replace(LIMITS["adreno"], texels=48 * 96 // 4 - 1)
    for other, limits in ((conv, LIMITS["mali"]), (conv, small), (Conv(1, 14, 14, 48, 94), LIMITS["adreno"])):
        assert not any(tiling.image for tiling in other.tilings(limits))


def test_mali_shares_positions_less(sources: dict[tuple[str, str], str]) -> None:
    """Every share costs a number written to main memory and read again; Adreno's meet in its local memory."""
    parts = {
        name: re.search(r"__local float part\w*\[(\d+)\]", sources[name, "float32"])
        for name in LIMITS
        if name in ("mali", "adreno")
    }
    assert all(parts.values())
    assert {name: int(found[1]) for name, found in parts.items() if found} == {"mali": 64, "adreno": 256}


def test_tiles_fit_the_registers(sources: dict[tuple[str, str], str]) -> None:
    """4 x 4 accumulators for the 64 registers of a Mali, 8 x 4 for the 192 of an Adreno; loads of four on both."""
    assert re.search(r"float acc\w*\[16\]", sources["mali", "float32"])
    assert re.search(r"float acc\w*\[32\]", sources["adreno", "float32"])
    assert all("vload4(0, x" in text for (_, dtype), text in sources.items() if dtype == "float32")


def test_float16_is_arithmetic_or_storage(sources: dict[tuple[str, str], str]) -> None:
    """Arithmetic where the device has it, and elsewhere only what every OpenCL has: loads and stores."""
    for name in ("mali", "adreno"):
        assert re.search(r"half part\w*\[", sources[name, "float16"]) and "vload_half" not in sources[name, "float16"]
        assert "#error" in sources[name, "float16"]
    storage = sources["generic-opencl", "float16"]
    assert "vload_half4(" in storage and "vstore_half4(" in storage and "#error" not in storage
    assert not re.search(r"half \w+\[|\(half\d?\)|convert_half", storage)


@pytest.mark.skipif(shutil.which("clang") is None, reason="there is no clang")
@pytest.mark.parametrize("name", ["mali", "adreno"])
def test_clang_compiles_the_arithmetic(name: str, sources: dict[tuple[str, str], str], tmp_path: Path) -> None:
    kernels = tmp_path / "kernels.cl"
    kernels.write_text(sources[name, "float16"])
    command = ["clang", "-x", "cl", "-cl-std=CL1.2", "-target", "spir64", "-Werror", "-S", "-emit-llvm", "-o", "-"]
    command += ["-Xclang", "-finclude-default-header", "-Xclang", "-fdeclare-opencl-builtins", str(kernels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"(fmul|fadd|fmuladd).* half|llvm\.fmuladd.*f16", done.stdout)


# Limits ---------------------------------------------------------------------------


def kernels() -> list[Any]:
    return [
        Conv(1, 56, 56, 48, 192, dtype="float16", given="float16"),
        Conv(1, 224, 224, 3, 24, kernel=(3, 3), strides=(2, 2), padding=SAME, epilogue=BIAS_GELU),
        Conv(1, 7, 7, 1280, 320, epilogue=BIAS_RESIDUAL, rank_one=True),
        Depthwise(1, 192, 56, 56, padding=SAME, epilogue=BIAS_GELU),
        Depthwise(1, 96, 28, 28, (5, 5), (2, 2), (2, 2, 2, 2), epilogue=RESIDUAL_RELU),
        Depthwise(1, 8, 12, 12, (7, 7), padding=(3, 3, 3, 3), epilogue=Epilogue(), dtype="float16"),
        Conv(1, 14, 14, 64, 64, (3, 1), padding=(1, 0, 1, 0), epilogue=RESIDUAL_RELU),
        Linear((1, 197), 192, 768, BIAS_GELU),
        Linear((2, 49), 90, 30, RESIDUAL_RELU, "float16", "float16"),
        Attention(1, 197, 197, 12, 64, 64, 0.125, epilogue=Epilogue(("bias", "add residual"))),
        LayerNorm((2, 49), 384, Epilogue(("gelu",)), "float16", "float32", eps=1e-6),
        Softmax((3,), 1000, Epilogue(("bias",))),
        Pool(1, 64, 112, 112, strides=(2, 2), padding=SAME, epilogue=Epilogue(("multiply gate",))),
        Mean(1, 320, 7, 7),
        Sample(1, 28, 28, 96, 6, 4),
        Attend(1, 7, 7, 320, 20, 1),
        Attend(1, 56, 56, 48, 3, 8),
        BatchSample(8, 28, 28, 96, 6, 4),
        Normalise(17, 7, 7, 320, 20, 1, dtype="float16"),
        Mix(8, 14, 14, 192, 12, 2),
        Spread(8, 28, 28, 96, 6, 4, dtype="float16"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_every_tiling_offered_fits_the_device(name: str) -> None:
    """And what a program is said to use is what its loops use, for some of the tilings."""
    from saevit_tvm.backends.launches import read, usage

    limits, chance = LIMITS[name], random.Random(name)
    for kernel in kernels():
        offered = kernel.tilings(limits)
        assert offered and offered[0] == kernel.default(limits)
        used = [kernel.program(limits, tiling).usage for tiling in offered]
        assert all(limits.excess(*each) is None for each in used)
        chosen = chance.randrange(len(offered))
        func = kernel.generated(limits, dataclasses.asdict(offered[chosen]))
        (counted,) = (usage(row) for row in read(func) if usage(row)[0] > 1)
        assert counted == used[chosen]


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        (Limits(32, 16384), 16),
        (Limits(256, 1024), 56),
        (Limits(256, 16384), 256),
        (Limits(256, 16384, registers_per_item=40), 56),
        (Limits(256, 16384, registers=1024), 56),
    ],
    ids=["small work-groups", "little local memory", "many tokens", "few registers", "small register file"],
)
def test_saa_declines_what_does_not_fit(limits: Limits, size: int) -> None:
    spec, given = saa_weights(1, size, size, 16, 1, 8, False)
    assert plan(spec, given, GENERIC) is not None or size == 256
    assert plan(spec, given, limits) is None and not accepts(spec, limits)


def test_families_promise_what_all_of_them_have() -> None:
    for gpu in GPUS:
        family = LIMITS[gpu.family]
        for limit in dataclasses.fields(Limits):
            assert getattr(family, limit.name) <= getattr(gpu.limits, limit.name)


def test_a_declaration_says_what_it_declares() -> None:
    more = [
        TensorConv(2, 7, 7, 48, 40, epilogue=BIAS_RESIDUAL, dtype="tf32"),
        TensorLinear((2, 3, 49), 32, 48, epilogue=Epilogue(), dtype="float16", own=True),
        GroupNorm((2, 4), 2 * 6 * 5, eps=1e-6, positions=30, height=6),
        CommonPart(1, 64, 7, 7),
        Head(1, 7, 7, 64, 10),
        Cast((1, 3, 8, 8), "float32", "float16"),
        Recover(1, 28, 28, 96, 6, 4, eps=1e-6, scale=0.1),
    ]
    assert {type(kernel) for kernel in [*kernels(), *more]} == set(KERNELS.values())
    for kernel in [*kernels(), *more]:
        func = declare(kernel)
        assert [buffer.name for buffer in func.params] == [*kernel.reads, "out"]
        assert [tuple(map(int, buffer.shape)) for buffer in func.params][-1] == kernel.out.extents
        assert [str(buffer.dtype) for buffer in func.params][:-1] == [each.dtype for each in kernel.reads.values()]
        assert kernel_of(func) == kernel and KernelSpec.parse(kernel.spec.text) == kernel.spec


def test_a_tiling_is_noted_by_its_numbers() -> None:
    import tvm

    conv = Conv(1, 14, 14, 48, 96)
    mod = tvm.IRModule({"main": declare(conv)})
    assert chosen_tiling(mod["main"]) is None
    for schedule, tiling in zip(tilings(mod, GENERIC)[:3], conv.tilings(GENERIC), strict=False):
        func, numbers = schedule.mod["main"], dataclasses.asdict(tiling)
        assert chosen_tiling(func) == numbers
        tvm.ir.assert_structural_equal(expand(func, GENERIC), conv.generated(GENERIC, numbers))
    # Of another kernel, or of one that has other knobs by now.
    assert chosen_tiling(tiled(mod, {"group": 64}).mod["main"]) is None
    # Loops, and the declaration of another generator.
    assert chosen_tiling(conv.generated(GENERIC)) is None
    assert kernel_of(declare_spec(logical("linear", (2, 8), weights(w=(8, 4)), (2, 4)))) is None


def test_no_kernel_is_a_reshape() -> None:
    """TVM asks this of every kernel with one input, and fails where it finds no block to look at."""
    from tvm import relax

    lone = [kernel for kernel in kernels() if len(kernel.reads) == 1]
    assert lone and not any(relax.analysis.has_reshape_pattern(kernel.generated(GENERIC)) for kernel in lone)
