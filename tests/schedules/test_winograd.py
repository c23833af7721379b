"""Convolutions by Winograd, held against the direct sum in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from schedules.cpu.generator import lowered
from schedules.cpu.primitives import winograd
from schedules.cpu.primitives.conv import Conv, ConvShape
from schedules.machines.cpus import AVX2, AVX512, NEON, SSE, Isa
from schedules.spec import Epilogue

Call = Callable[..., np.ndarray]
UNITS = {"avx512": AVX512, "avx2": AVX2, "sse": SSE, "neon": NEON}
BUSY = Epilogue(("bias", "add other", "relu"))


def normal(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed + sum(size)).standard_normal(size).astype(np.float32)


def shaped(n: int, h: int, w: int, c: int, k: int, edge: int = 1, epilogue: Epilogue = BUSY) -> ConvShape:
    return ConvShape(n=n, h=h, w=w, c=c, kernel=(3, 3), padding=(edge,) * 4, k=k, epilogue=epilogue)


def computed(call: Call, shape: ConvShape, unit: Isa, tiling: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What squares make, and the direct sum."""
    inputs = {"x": x, **{name: normal(*shape.result, seed=1) for name in shape.epilogue.operands}}
    weights = {"w": normal(3, 3, shape.c, shape.k, seed=2) * np.float32((9 * shape.c) ** -0.5)}
    weights |= {name: normal(shape.k, seed=3) for name in shape.epilogue.weights}
    with np.errstate(all="ignore"):
        expected = Conv().reference_for(shape, {**inputs, **weights})
    func, packed = lowered(winograd.Winograd(shape, unit, tiling), weights, len(inputs))
    return call(func, [*inputs.values(), *packed], expected.shape), expected


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("square", winograd.SQUARES)
@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        (shaped(1, 12, 12, 16, 32), {}),  # whole squares
        (shaped(2, 7, 9, 20, 36), {"bands": 3, "chunk": 5}),  # squares, channels and threads that do not fit
        (shaped(1, 8, 6, 32, 70, edge=0), {"groups": 2}),  # no edge at all, and the channels shared
        (shaped(1, 3, 2, 16, 16, edge=2), {"bands": 1, "chunk": 1}),  # a square that is larger than the image
    ],
)
def test_squares(call: Call, square: int, shape: ConvShape, cut: dict[str, int], unit: str) -> None:
    tiling = replace(winograd.tiling(shape, UNITS[unit], 2, square), **cut)
    found, expected = computed(call, shape, UNITS[unit], tiling, normal(*shape.image))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("square", winograd.SQUARES)
def test_error_stays_near_that_of_the_direct_sum(call: Call, here: Isa, square: int) -> None:
    shape = shaped(1, 16, 16, 512, 32, epilogue=Epilogue())
    found, expected = computed(call, shape, here, winograd.tiling(shape, here, 1, square), normal(*shape.image))
    assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < 3e-6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("square", winograd.SQUARES)
def test_what_is_no_number_is_never_lost(call: Call, here: Isa, square: int, value: float) -> None:
    """Within a square it may spread, and an infinity may become nan; what sees it is no number in any case."""
    shape = shaped(1, 12, 12, 16, 16, epilogue=Epilogue())
    x = normal(*shape.image)
    x[0, 5, 6, 3] = value
    found, expected = computed(call, shape, here, winograd.tiling(shape, here, 1, square), x)
    assert not np.isfinite(found[~np.isfinite(expected)]).any()
    beyond = np.abs(np.arange(12) - 5) > square
    np.testing.assert_allclose(found[0, beyond], expected[0, beyond], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "square"),
    [
        (shaped(1, 56, 56, 64, 64), 4),
        (shaped(1, 14, 14, 256, 256), 2),  # weights that come from the memory
        (shaped(1, 1, 1, 512, 512), 0),
        (shaped(1, 56, 56, 8, 64), 0),  # less than a vector
        (replace(shaped(1, 56, 56, 64, 64), strides=(2, 2)), 0),
        (replace(shaped(1, 56, 56, 64, 64), dilation=(2, 2)), 0),
        (replace(shaped(1, 56, 56, 64, 64), parts=2), 0),
    ],
)
def test_when_it_pays(shape: ConvShape, square: int) -> None:
    assert Conv().default_for(shape, AVX512, 1).square == square


def test_rounding_of_half_precision_is_not_tripled() -> None:
    assert not Conv().default_for(shaped(1, 56, 56, 64, 64), NEON.storing("float16"), 1).square


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("square", winograd.SQUARES)
def test_tilings_of_any_number_of_threads(call: Call, here: Isa, square: int, threads: int) -> None:
    shape = shaped(1, 10, 10, 40, 40, epilogue=Epilogue())
    tiling = winograd.tiling(shape, here, threads, square)
    found, expected = computed(call, shape, here, tiling, normal(*shape.image))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("square", winograd.SQUARES)
def test_squares_of_two_threads_are_alike(call: Call, here: Isa, square: int) -> None:
    """Some are made by both, in other tiles: to the last bit the same as by one, whoever is last."""
    shape = shaped(1, 14, 14, 40, 40)  # 49 or 16 squares
    whole = replace(winograd.tiling(shape, here, 1, square), chunk=13)
    made = [computed(call, shape, here, replace(whole, bands=bands), normal(*shape.image))[0] for bands in (1, 2, 3, 5)]
    assert all(np.array_equal(each, made[0]) for each in made)
