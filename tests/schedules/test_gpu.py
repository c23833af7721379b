"""The GPU kernels of every region against PyTorch, run for real by an OpenCL driver (PoCL)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from saevit_tvm.runtime import opencl
from schedules.gpu.launch import Limits, Lowered
from schedules.gpu.regions import lower

LIMITS = Limits(work_group=256, local_bytes=16384)
TARGET = {"kind": "opencl", "host": {"kind": "llvm"}}
on_a_device = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where libraries and compiled kernels go."""
    folder = tmp_path_factory.mktemp("gpu")
    before = os.environ.get("SAEVIT_TVM_CACHE")
    os.environ["SAEVIT_TVM_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SAEVIT_TVM_CACHE")
    if before is not None:
        os.environ["SAEVIT_TVM_CACHE"] = before


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Numbers of a size that keeps sums near one."""
    random = np.random.RandomState(0)
    return {name: (random.standard_normal(shape) * 0.3).astype("float32") for name, shape in shapes.items()}


def image(*shape: int) -> np.ndarray:
    return np.random.RandomState(1).standard_normal(shape).astype("float32") + 0.5


def compute(lowered: Lowered, x: np.ndarray, folder: Path) -> np.ndarray:
    """Run the launches one after the other on the first OpenCL device."""
    import tvm

    opencl.activate()
    device = tvm.runtime.device("opencl", 0)
    functions = {f"k{i}": launch.func.with_attr("global_symbol", f"k{i}") for i, launch in enumerate(lowered.launches)}
    path = folder / f"{len(list(folder.iterdir()))}.so"
    tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(TARGET)).export_library(str(path))
    module = tvm.runtime.load_module(str(path))
    values: dict[str, Any] = {name: tvm.runtime.tensor(value, device) for name, value in lowered.constants.items()}
    values["x"] = tvm.runtime.tensor(x, device)
    for i, launch in enumerate(lowered.launches):
        # It starts as NaN, so that gaps show.
        values[launch.writes] = tvm.runtime.tensor(np.full(launch.shape, np.nan, "float32"), device)
        module[f"k{i}"](*(values[name] for name in (*launch.reads, launch.writes)))
    return values["out"].numpy()


def agree(lowered: Lowered | None, x: np.ndarray, expected: torch.Tensor, folder: Path) -> None:
    assert lowered is not None
    wanted = expected.numpy()
    deviation = np.abs(compute(lowered, x, folder) - wanted).max() / max(1.0, np.abs(wanted).max())
    assert deviation < 2e-5


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


@on_a_device
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "heads", "r", "by_position"),
    [
        (1, 16, 24, 32, 2, 8, False),
        (2, 14, 14, 48, 3, 2, False),
        (1, 7, 7, 64, 4, 1, False),
        (1, 9, 6, 20, 2, 3, True),
        (2, 7, 9, 16, 1, 4, True),  # partly filled windows below and on the right
        (1, 1, 1, 16, 1, 1, False),
    ],
)
def test_saa(n: int, h: int, w: int, c: int, heads: int, r: int, by_position: bool, folder: Path) -> None:
    given = weights(ln_g=(c,), ln_b=(c,), qkv_w=(c, 3 * c), qkv_b=(3 * c,), pr_w=(c, c), pr_b=(c,))
    if r > 1:
        given |= weights(sal_w=(3, 3, c), sal_b=(r, r) if by_position else (1,), up_w=(r, r, c), up_b=(c,))
    shape = {"n": n, "h": h, "w": w, "c": c, "heads": heads, "r": r, "eps": 1e-5, "scale": 0.25}
    x = image(n, c, h, w)
    expected = saa(torch.from_numpy(x).double(), doubles(given), heads, r, 1e-5, 0.25)
    lowered = lower("saa", shape, given, LIMITS)
    agree(lowered, x, expected, folder)
    assert lowered is not None and len(lowered.launches) == (4 if r > 1 else 3)


@on_a_device
@pytest.mark.parametrize(("n", "h", "w", "c", "e"), [(1, 8, 8, 16, 64), (2, 10, 7, 12, 20), (1, 7, 7, 9, 18)])
def test_ciffn(n: int, h: int, w: int, c: int, e: int, folder: Path) -> None:
    given = weights(ex_w=(c, e), ex_b=(e,), dw_w=(3, 3, e), dw_b=(e,), dec_w=(e,), dec_b=(1,), g=(e,))
    given |= weights(pr_w=(e, c), pr_b=(c,))
    x, exact = image(n, c, h, w), doubles(given)
    z = depthwise(pointwise(torch.from_numpy(x).double(), exact["ex_w"], exact["ex_b"]), exact)
    common = F.gelu(pointwise(z, exact["dec_w"][:, None], exact["dec_b"]))
    z = z + exact["g"][:, None, None] * (z - common)
    expected = torch.from_numpy(x).double() + pointwise(z, exact["pr_w"], exact["pr_b"])
    agree(lower("ciffn", {"n": n, "h": h, "w": w, "c": c, "e": e}, given, LIMITS), x, expected, folder)


@on_a_device
def test_dwsconv(folder: Path) -> None:
    n, h, w, c = 2, 13, 9, 24
    given = weights(dw_w=(3, 3, c), dw_b=(c,), pw_w=(c, c), pw_b=(c,))
    x, exact = image(n, c, h, w), doubles(given)
    expected = torch.from_numpy(x).double()
    expected = expected + pointwise(depthwise(expected, exact), exact["pw_w"], exact["pw_b"])
    agree(lower("dwsconv", {"n": n, "h": h, "w": w, "c": c}, given, LIMITS), x, expected, folder)


@on_a_device
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "k", "kernel", "stride", "padding", "activation"),
    [
        (1, 33, 18, 3, 10, 3, 2, 1, "gelu"),
        (2, 12, 12, 8, 16, 3, 1, 0, None),
        (1, 6, 6, 5, 7, 1, 1, 0, "gelu"),
        (1, 8, 8, 6, 8, 1, 2, 0, None),
        (1, 20, 21, 3, 4, 7, 4, 3, None),
    ],
)
def test_conv(
    n: int, h: int, w: int, c: int, k: int, kernel: int, stride: int, padding: int, activation: str | None, folder: Path
) -> None:
    shape = {"n": n, "h": h, "w": w, "c": c, "k": k}
    shape |= {"kernel": kernel, "stride": stride, "padding": padding, "activation": activation}
    given = weights(w=(kernel, kernel, c, k), b=(k,))
    x, exact = image(n, c, h, w), doubles(given)
    expected = F.conv2d(torch.from_numpy(x).double(), exact["w"].permute(3, 2, 0, 1), exact["b"], stride, padding)
    expected = F.gelu(expected) if activation else expected
    agree(lower("conv", shape, given, LIMITS), x, expected, folder)


# What is declined -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "size"),
    [(Limits(64, 16384), 16), (Limits(256, 1024), 56), (Limits(256, 16384), 256)],
    ids=["small work-groups", "little local memory", "many tokens"],
)
def test_saa_declines_what_does_not_fit(limits: Limits, size: int) -> None:
    c = 16
    given = weights(ln_g=(c,), ln_b=(c,), qkv_w=(c, 3 * c), qkv_b=(3 * c,), pr_w=(c, c), pr_b=(c,))
    given |= weights(sal_w=(3, 3, c), sal_b=(1,), up_w=(8, 8, c), up_b=(c,))
    shape = {"n": 1, "h": size, "w": size, "c": c, "heads": 1, "r": 8, "eps": 1e-5, "scale": 0.25}
    assert lower("saa", shape, given, limits) is None


def test_work_groups_keep_to_the_limit() -> None:
    """Whatever is launched has at most as many work-items as the device promises."""
    given = weights(w=(3, 3, 8, 16), b=(16,))
    shape = {"n": 1, "h": 8, "w": 8, "c": 8, "k": 16, "kernel": 3, "stride": 2, "padding": 1, "activation": None}
    for limits in (Limits(128, 16384), Limits(256, 16384, wave=128)):
        lowered = lower("conv", shape, given, limits)
        assert lowered is not None
        found = re.findall(r'(\d+), thread="threadIdx', lowered.launches[0].func.script())
        size = np.prod([int(extent) for extent in found])
        assert size == limits.wave <= limits.work_group
