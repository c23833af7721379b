"""CIFFN, DWSConv, convolution and head, held against plain numpy in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from schedules.cpu.fused.ciffn import CIFFN, CIFFNShape
from schedules.cpu.fused.dwsconv import DWSConv, DWSConvShape
from schedules.cpu.fused.head import Head, HeadShape
from schedules.cpu.generator import Generator, lowered
from schedules.cpu.primitives.conv import Conv, ConvShape
from schedules.machines.cpus import NEON, Isa, isa_of
from schedules.spec import Epilogue

Call = Callable[..., np.ndarray]
TOLERANCE = 1e-5
ONE = (1, 1, 1, 1)
GELU = Epilogue(("bias", "gelu"))
FAMILIES: dict[type, Generator] = {CIFFNShape: CIFFN(), DWSConvShape: DWSConv(), ConvShape: Conv(), HeadShape: Head()}


def normal(*size: int, seed: int = 0) -> np.ndarray:
    fan_in = int(np.prod(size[:-1])) if len(size) > 1 else 4
    return (np.random.RandomState(seed + sum(size)).standard_normal(size) / fan_in**0.5).astype(np.float32)


def weights_of(shape: Any) -> dict[str, np.ndarray]:
    c = shape.c
    if isinstance(shape, CIFFNShape):
        e = shape.e
        depth = {"dw_w": normal(3, 3, e), "dw_b": normal(e, seed=1), "dec_w": normal(e, 1)[:, 0], "dec_b": normal(1)}
        outer = {"ex_w": normal(c, e), "ex_b": normal(e, seed=2), "pr_w": normal(e, c), "pr_b": normal(c)}
        return {**depth, **outer, "g": normal(e, seed=3)}
    if isinstance(shape, DWSConvShape):
        return {"dw_w": normal(3, 3, c), "dw_b": normal(c), "pw_w": normal(c, c), "pw_b": normal(c, seed=1)}
    if isinstance(shape, ConvShape):
        return {"w": normal(*shape.kernel, c, shape.k), "b": normal(shape.k)}
    return {"w": normal(c, shape.k), "b": normal(shape.k)}


def computed(
    call: Call,
    isa: Isa,
    shape: Any,
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    threads: int = 1,
    **knobs: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel makes, and what it should."""
    family = FAMILIES[type(shape)]
    tiling = dataclasses.replace(family.default_for(shape, isa, threads), **knobs)
    expected = family.reference_for(shape, {"x": x, **weights})
    func, packed = lowered(family.loops(shape, isa, tiling, threads), weights)
    return call(func, [x, *packed], expected.shape), expected


def error(call: Call, isa: Isa, shape: Any, threads: int = 1, **knobs: int) -> float:
    image = shape.image if isinstance(shape, ConvShape) else (shape.n, shape.h, shape.w, shape.c)
    x = 2 * np.random.RandomState(7).standard_normal(image).astype(np.float32)
    found, expected = computed(call, isa, shape, x, weights_of(shape), threads, **knobs)
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "threads", "knobs"),
    [
        (CIFFNShape(1, 14, 14, 24, 96), 1, {}),
        (CIFFNShape(1, 9, 10, 20, 44), 1, {"chunk": 4, "strip": 4}),  # rolls: 4 + 4 + 1 rows, odd channels
        (CIFFNShape(2, 12, 8, 16, 64), 2, {"bands": 2, "chunk": 2}),  # rolls within bands
        (CIFFNShape(1, 13, 7, 16, 48), 4, {"bands": 4, "chunk": 3}),  # bands of 3 and 4 rows
        (CIFFNShape(2, 7, 7, 32, 128), 8, {}),  # by channels
        (CIFFNShape(3, 2, 3, 5, 7), 2, {}),
        (CIFFNShape(1, 1, 1, 8, 32), 1, {}),
    ],
)
def test_ciffn(call: Call, here: Isa, shape: CIFFNShape, threads: int, knobs: dict[str, int]) -> None:
    assert error(call, here, shape, threads, **knobs) < TOLERANCE


@pytest.mark.parametrize(
    ("shape", "threads", "knobs"),
    [
        (DWSConvShape(1, 14, 14, 32), 1, {}),
        (DWSConvShape(2, 9, 15, 20), 2, {"chunk": 3}),
        (DWSConvShape(1, 6, 3, 13), 4, {}),
        (DWSConvShape(3, 1, 1, 5), 1, {}),
    ],
)
def test_dwsconv(call: Call, here: Isa, shape: DWSConvShape, threads: int, knobs: dict[str, int]) -> None:
    assert error(call, here, shape, threads, **knobs) < TOLERANCE


@pytest.mark.parametrize(
    ("shape", "threads", "knobs"),
    [
        (ConvShape(1, 32, 32, 3, (3, 3), (2, 2), ONE, k=24, epilogue=GELU), 1, {"chunk": 5}),
        (ConvShape(2, 11, 9, 5, (3, 3), (2, 2), ONE, k=13), 2, {}),
        (ConvShape(2, 12, 13, 3, (3, 3), (2, 2), ONE, k=24, epilogue=GELU, channels_first=True), 2, {"chunk": 4}),
        (
            ConvShape(1, 14, 14, 16, (3, 3), (2, 2), ONE, k=80),
            2,
            {"groups": 2, "bands": 1},
        ),  # columns split between tasks
        (
            ConvShape(1, 13, 9, 4, (5, 5), k=50, padding=(2, 2, 2, 2)),
            4,
            {"groups": 2, "bands": 2},
        ),  # the last panel is narrow
        (ConvShape(1, 8, 8, 16, (1, 1), k=24), 1, {}),
        (ConvShape(1, 3, 3, 2, (3, 3), k=3), 1, {}),
    ],
)
def test_conv(call: Call, here: Isa, shape: ConvShape, threads: int, knobs: dict[str, int]) -> None:
    assert error(call, here, shape, threads, **knobs) < TOLERANCE


@pytest.mark.parametrize(
    ("shape", "threads"),
    [(HeadShape(1, 7, 7, 64, 100), 2), (HeadShape(5, 3, 4, 21, 10), 1), (HeadShape(2, 1, 1, 3, 1), 2)],
)
def test_head(call: Call, here: Isa, shape: HeadShape, threads: int) -> None:
    assert error(call, here, shape, threads) < TOLERANCE


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF], ids=hex)
@pytest.mark.parametrize(
    "shape",
    [
        CIFFNShape(1, 6, 7, 24, 48),
        DWSConvShape(1, 6, 7, 16),
        ConvShape(1, 9, 9, 4, (3, 3), k=24, epilogue=GELU),
        HeadShape(1, 3, 3, 8, 10),
    ],
    ids=lambda shape: type(shape).__name__,
)
def test_what_is_no_number_stays_none(call: Call, here: Isa, shape: Any, bits: int) -> None:
    x = 2 * np.random.RandomState(7).standard_normal((1, shape.h, shape.w, shape.c)).astype(np.float32)
    x.view(np.uint32)[0, 1, 2, 3] = bits
    found, expected = computed(call, here, shape, x, weights_of(shape))
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        CIFFNShape(1, 9, 10, 22, 44),  # neither x's channels nor a block of the expanded are whole vectors
        DWSConvShape(1, 9, 15, 23),
        ConvShape(1, 11, 9, 5, (3, 3), (2, 2), ONE, k=13, epilogue=GELU),
        ConvShape(1, 13, 9, 4, (5, 5), k=50, padding=(2, 2, 2, 2)),
        HeadShape(5, 3, 4, 21, 10),
    ],
)
def test_neon_multiplies_by_lanes(call: Call, shape: Any) -> None:
    """LLVM makes code for this CPU of NEON's vectors, too."""
    assert error(call, NEON, shape, threads=2) < TOLERANCE


def test_zeros_around_the_image_are_not_the_bias(call: Call, here: Isa) -> None:
    """Expanded pixels outside the image are zero although those inside have a bias: a classic mistake."""
    shape = CIFFNShape(1, 3, 3, 8, 32)
    weights = weights_of(shape)
    weights["ex_b"] = np.full(32, 5.0, np.float32)
    found, expected = computed(call, here, shape, np.zeros((1, 3, 3, 8), np.float32), weights)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[0, 0, 0] - found[0, 1, 1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        CIFFNShape(1, 6, 5, 16, 48),
        ConvShape(1, 9, 9, 8, (3, 3), (2, 2), ONE, k=40),
        DWSConvShape(1, 8, 8, 24),
        HeadShape(1, 2, 2, 16, 70),
    ],
)
def test_every_tiling_on_offer_is_right(call: Call, here: Isa, shape: Any) -> None:
    offered = FAMILIES[type(shape)].tilings_for(shape, here)
    assert len(offered) == len(set(offered)) >= 4
    for tiling in np.random.RandomState(0).permutation(len(offered))[:2]:
        assert error(call, here, shape, **dataclasses.asdict(offered[tiling])) < TOLERANCE


@pytest.mark.parametrize(
    ("target", "multiply"),
    [
        ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}, "zmm"),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, "fmla"),
    ],
)
def test_the_same_generator_serves_other_vectors(
    assembly: Callable[..., str], target: dict[str, Any], multiply: str
) -> None:
    shape, isa = DWSConvShape(1, 4, 8, 32), isa_of(target)
    func = DWSConv().loops(shape, isa, DWSConv().default_for(shape, isa, 1), 1).function()
    assert assembly(func, target).count(multiply) > 100
