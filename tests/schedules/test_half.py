"""Kernels in float16, held against float64.

NEON's kernels run here, too: LLVM computes in float16 on any CPU, if slowly, and rounds after every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm

from schedules.cpu import microkernel
from schedules.cpu.builder import Builder
from schedules.cpu.fused.ciffn import CIFFN, CIFFNShape
from schedules.cpu.fused.dwsconv import DWSConv, DWSConvShape
from schedules.cpu.fused.head import Head, HeadShape
from schedules.cpu.fused.saa import SAA
from schedules.cpu.generator import Generator, lowered
from schedules.cpu.math import gelu
from schedules.cpu.microkernel import Rows, Tile
from schedules.cpu.primitives.conv import Conv, ConvShape
from schedules.cpu.reference import gelu as exact_gelu
from schedules.cpu.registry import tilings
from schedules.kernels import declare
from schedules.machines.cpus import NEON, isa_of
from schedules.saa_shape import SAAShape
from schedules.spec import Epilogue, KernelSpec, Tensor

ROUNDING = 2**-11  # of one number in float16
GELU = Epilogue(("bias", "gelu"))
FAMILIES: dict[str, Generator] = {each.OP: each for each in (SAA(), CIFFN(), DWSConv(), Head(), Conv())}
Call = Callable[..., np.ndarray]


def region(name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A shape, small but with partly filled vectors and sums longer than one part, and weights for it."""
    random = np.random.RandomState(0)

    def normal(*size: int) -> np.ndarray:
        fan_in = np.prod(size[:-1]) if len(size) > 1 else 4
        return (random.standard_normal(size) / fan_in**0.5).astype("float32")

    image = (1, 10, 6)
    if name == "ciffn":
        weights = {"ex_w": normal(20, 84), "ex_b": normal(84), "dw_w": normal(3, 3, 84), "dw_b": normal(84)}
        weights |= {
            "dec_w": normal(84),
            "dec_b": normal(1),
            "g": normal(84),
            "pr_w": normal(84, 20),
            "pr_b": normal(20),
        }
        return CIFFNShape(*image, 20, 84), weights
    if name == "dwsconv":
        return DWSConvShape(*image, 76), {
            "dw_w": normal(3, 3, 76),
            "dw_b": normal(76),
            "pw_w": normal(76, 76),
            "pw_b": normal(76),
        }
    if name == "conv":
        shape = ConvShape(*image, 9, (3, 3), (2, 2), (1, 1, 1, 1), k=20, epilogue=GELU)
        return shape, {"w": normal(3, 3, 9, 20), "b": normal(20)}
    if name == "head":
        return HeadShape(*image, 84, 10), {"w": normal(84, 10), "b": normal(10)}
    weights = {"ln_g": 1 + normal(32), "ln_b": normal(32), "sal_w": normal(3, 3, 32), "sal_b": normal(1)}
    weights |= {"qkv_w": normal(32, 96), "qkv_b": normal(96), "pr_w": normal(32, 32), "pr_b": normal(32)}
    weights |= {"up_w": normal(4, 4, 32), "up_b": normal(32)}
    return SAAShape(*image, 32, 2, 4), weights


def kernel(name: str, shape: Any, weights: dict[str, np.ndarray], threads: int = 1) -> Any:
    family = FAMILIES[name]
    unit = NEON.storing("float16")
    unit = unit.wide() if family.WIDE else unit
    return lowered(family.loops(shape, unit, family.default_for(shape, unit, threads), threads), weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_region(call: Call, name: str) -> None:
    shape, weights = region(name)
    random = np.random.RandomState(1)
    x = random.standard_normal((shape.n, shape.h, shape.w, shape.c)).astype("float16")
    expected = FAMILIES[name].reference_for(shape, {"x": x.astype("float64"), **weights})
    func, packed = kernel(name, shape, weights, threads=2)
    found = call(func, [x, *packed], expected.shape)
    assert found.dtype == np.float16
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert ROUNDING / 100 < error < 4 * ROUNDING


def test_a_picture_comes_as_float32(call: Call) -> None:
    shape, weights = region("conv")
    x = np.random.RandomState(1).standard_normal((1, 9, 10, 6)).astype("float32")
    shape = replace(shape, channels_first=True)
    expected = Conv().reference_for(shape, {"x": x, **weights})
    func, packed = kernel("conv", shape, weights)
    found = call(func, [x, *packed], expected.shape)
    assert np.abs(found - expected).max() < 4 * ROUNDING * np.abs(expected).max()


@pytest.mark.parametrize(
    "depth", [((64, 1),), ((4096, 1),), ((3, 1100), (1000, 1)), ((50, 70), (70, 1)), ((130, 9), (9, 1))]
)
def test_long_sums_lose_no_more_than_short_ones(call: Call, depth: tuple[tuple[int, int], ...]) -> None:
    """Sums of 64 and of 4096 products are as accurate: what one part loses does not grow with their number."""
    isa, tile = NEON.storing("float16"), Tile(3, 2)
    extents = [extent for extent, _ in depth]
    length = sum((extent - 1) * step for extent, step in depth) + 1
    b = Builder(isa.dtype, isa.stored)
    a, weight = b.param("a", (5, length)), b.param("weight", (1, int(np.prod(extents)), 16))
    out = b.param("out", (5, 16))
    rows = Rows(a, lambda row: row * length, depth)
    microkernel.gemm(b, isa, tile, rows, weight, 5, 16, lambda row, at, value: b.store(out, row * 16 + at, value))
    random = np.random.RandomState(0)
    left = random.standard_normal((5, length)).astype("float16")
    right = random.standard_normal((1, int(np.prod(extents)), 16)).astype("float16")
    places = sum(np.arange(extent).reshape([-1] + [1] * below) * step for below, (extent, step) in _from_inside(depth))
    expected = left[:, places.reshape(-1)].astype("float64") @ right[0]
    found = call(b.function("product"), [left, right], (5, 16))
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    assert ROUNDING / 4 < error < 4 * ROUNDING


def _from_inside(depth: tuple[tuple[int, int], ...]) -> list[tuple[int, tuple[int, int]]]:
    return [(len(depth) - 1 - index, each) for index, each in enumerate(depth)]


def test_gelu(call: Call) -> None:
    x = np.linspace(-8, 8, 16_000).astype("float16")
    b = Builder("float16", "float16")
    source, target = b.param("x", x.shape), b.param("y", x.shape)
    with b.loop("i", x.size // 8) as i:
        b.store(target, i * 8, gelu(b, b.load(source, i * 8, 8)))
    error = np.abs(call(b.function("through"), [x], x.shape) - exact_gelu(x.astype("float64")))
    assert error[np.abs(x) < 2].max() < 1e-3 and error.max() < 4.5 * ROUNDING


@pytest.mark.parametrize("name", ["ciffn", "dwsconv", "conv"])
def test_neon_computes_eight_at_a_time(assembly: Callable[..., str], name: str) -> None:
    """All multiply-adds are of float16."""
    target = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}
    assert isa_of(target) == NEON
    func, _ = kernel(name, *region(name))
    lines = [line for line in assembly(func, target).splitlines() if line.strip().startswith("fmla\tv")]
    assert len(lines) > 100
    assert sum(".8h" in line for line in lines) > 0.8 * len(lines)  # the rest are tails
    assert not any(".4s" in line for line in lines)


def dwsconv_spec(dtype: str) -> KernelSpec:
    shape, weights = region("dwsconv")
    x = Tensor("x", (shape.n, shape.h, shape.w, shape.c), dtype, "NHWC")
    return KernelSpec.of(
        "dwsconv", [x], [Tensor(name, value.shape) for name, value in weights.items()], [replace(x, name="out")]
    )


def test_declarations_of_both_types_differ() -> None:
    """So that a record of one is never taken for the other."""
    single, half = (declare(dwsconv_spec(dtype)) for dtype in ("float32", "float16"))
    assert [str(param.dtype) for param in single.params] == ["float32"] * 6
    assert [str(param.dtype) for param in half.params] == ["float16", *["float32"] * 4, "float16"]


def test_tilings_are_those_of_the_type() -> None:
    def vectors(dtype: str) -> list[str]:
        func = declare(dwsconv_spec(dtype))
        offered = tilings(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), NEON)
        return [str(schedule.mod["main"].body.block.body.block.annotations) for schedule in offered]

    assert vectors("float32") != vectors("float16")
