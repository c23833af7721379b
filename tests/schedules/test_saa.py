"""SAA as one kernel, held against plain numpy in float64."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import tirx

from schedules.cpu.fused.saa import SAA, Tiling
from schedules.cpu.generator import lowered
from schedules.machines import cpus
from schedules.machines.cpus import Isa, isa_of
from schedules.saa_shape import SAAShape
from schedules.spec import KernelSpec, Tensor

AVX512 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}
NEON = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}
TOLERANCE = 1e-5
FAMILY = SAA()

Call = Callable[..., np.ndarray]


def random_weights(shape: SAAShape, seed: int = 0) -> dict[str, np.ndarray]:
    random, c = np.random.RandomState(seed), shape.c

    def normal(*size: int, scale: float = 1.0) -> np.ndarray:
        return (random.standard_normal(size) * scale).astype("float32")

    weights = {
        "ln_g": 1 + normal(c, scale=0.3),
        "ln_b": normal(c, scale=0.3),
        "qkv_w": normal(c, 3 * c, scale=c**-0.5),
        "qkv_b": normal(3 * c, scale=0.2),
        "pr_w": normal(c, c, scale=c**-0.5),
        "pr_b": normal(c, scale=0.2),
    }
    if shape.r > 1:
        weights["sal_w"] = normal(3, 3, c, scale=(3 * c) ** -0.5)
        weights["sal_b"] = normal(1)
        weights["up_w"] = normal(shape.r, shape.r, c)
        weights["up_b"] = normal(c, scale=0.3)
    return weights


def random_input(shape: SAAShape, mean: float = 0.0) -> np.ndarray:
    x = np.random.RandomState(1).standard_normal((shape.n, shape.h, shape.w, shape.c))
    return (x + mean).astype("float32")


def computed(
    call: Call,
    vectors: Isa,
    shape: SAAShape,
    x: np.ndarray,
    weights: dict[str, np.ndarray],
    tiling: Tiling | None = None,
    threads: int = 1,
) -> np.ndarray:
    tiling = tiling or FAMILY.default_for(shape, vectors, threads)
    func, packed = lowered(FAMILY.loops(shape, vectors, tiling, threads), weights)
    return call(func, [x, *packed], x.shape)


def kernel(shape: SAAShape, vectors: Isa, threads: int = 1, seed: int = 0) -> tuple[tirx.PrimFunc, list[np.ndarray]]:
    loops = FAMILY.loops(shape, vectors, FAMILY.default_for(shape, vectors, threads), threads)
    return lowered(loops, random_weights(shape, seed))


def expected_of(shape: SAAShape, x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    return FAMILY.reference_for(shape, {"x": x, **weights})


def error(
    call: Call, vectors: Isa, shape: SAAShape, tiling: Tiling | None = None, threads: int = 1, mean: float = 0.0
) -> float:
    """The largest, relative to the largest value."""
    weights, x = random_weights(shape), random_input(shape, mean)
    expected = expected_of(shape, x, weights)
    result = computed(call, vectors, shape, x, weights, tiling, threads)
    return float(np.abs(result - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (SAAShape(1, 56, 56, 48, 3, 8), 1),
        (SAAShape(1, 28, 28, 96, 6, 4), 2),
        (SAAShape(1, 14, 14, 192, 12, 2), 8),
        (SAAShape(1, 14, 14, 240, 15, 2), 1),
        (SAAShape(1, 7, 7, 320, 20, 1), 1),
        (SAAShape(1, 7, 7, 384, 24, 1), 2),
    ],
)
def test_every_shape_of_the_published_sizes(call: Call, here: Isa, shape: SAAShape, threads: int) -> None:
    assert error(call, here, shape, threads=threads) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        pytest.param(SAAShape(2, 16, 16, 16, 1, 8), 1, id="four tokens, one head"),
        pytest.param(SAAShape(1, 2, 2, 64, 4, 1), 4, id="four tokens without windows"),
        pytest.param(SAAShape(1, 1, 1, 16, 1, 1), 2, id="one token without windows"),
        pytest.param(SAAShape(1, 9, 15, 16, 2, 3), 2, id="rate 3, heads of 8"),
        pytest.param(SAAShape(3, 8, 12, 64, 2, 2), 2, id="heads of 32, images not even among threads"),
        pytest.param(SAAShape(4, 4, 4, 32, 2, 1), 2, id="whole images among threads"),
        pytest.param(SAAShape(1, 16, 16, 16, 1, 1), 4, id="256 tokens"),
        pytest.param(SAAShape(1, 9, 11, 16, 1, 4), 1, id="partly filled windows"),
        pytest.param(SAAShape(2, 13, 5, 24, 3, 8), 4, id="partly filled windows, 24 channels"),
        pytest.param(SAAShape(1, 6, 6, 10, 2, 2), 1, id="10 channels, heads of 5"),
    ],
)
def test_odd_shapes(call: Call, here: Isa, shape: SAAShape, threads: int) -> None:
    assert error(call, here, shape, threads=threads) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [cpus.AVX512, cpus.NEON], ids=lambda vectors: vectors.name)
def test_vectors_of_every_width_compute_the_same(call: Call, vectors: Isa) -> None:
    """LLVM splits vectors that are too wide for this CPU, so the code for other CPUs can be run here."""
    assert error(call, vectors, SAAShape(1, 8, 12, 48, 3, 4)) < TOLERANCE


@pytest.mark.parametrize("rate", [1, 2])
def test_a_large_mean_of_the_channels_costs_no_accuracy(call: Call, here: Isa, rate: int) -> None:
    assert error(call, here, SAAShape(1, 4, 4, 16, 1, rate), mean=20.0) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1, 2])
def test_a_softmax_of_large_numbers_is_safe(call: Call, here: Isa, rate: int) -> None:
    """Scores of thousands below zero, where the tokens do not fill the vectors."""
    shape = SAAShape(1, 5 * rate, 5 * rate, 16, 1, rate)
    weights, x = random_weights(shape), random_input(shape)
    weights["qkv_b"][:16] -= 50.0
    weights["qkv_b"][16:32] += 50.0
    if rate > 1:
        weights["sal_w"] *= 300.0
    result, expected = computed(call, here, shape, x, weights), expected_of(shape, x, weights)
    # A rounding of a score of thousands is a visible part of its power: this is about safety, not precision.
    assert np.abs(result - expected).max() < 1e-2 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF], ids=hex)
@pytest.mark.parametrize("rate", [1, 2])
def test_what_is_no_number_makes_all_none(call: Call, here: Isa, rate: int, bits: int) -> None:
    """A position without a number leaves its token without one, and every token attends to it."""
    shape = SAAShape(1, 4, 6, 32, 2, rate)
    x = random_input(shape)
    x.view(np.uint32)[0, 1, 2, 3] = bits
    func, packed = kernel(shape, here)
    assert np.isnan(call(func, [x, *packed], x.shape)).all()


def test_heads_that_do_not_divide_the_channels_are_declined() -> None:
    x = Tensor("x", (1, 4, 4, 32), layout="NHWC")
    attrs = {"r": 1, "eps": 1e-5, "scale": 0.25}
    accepted = [
        FAMILY.accepts(KernelSpec.of("saa", [x], [], [x], attrs | {"heads": heads}), cpus.AVX2) for heads in (2, 3)
    ]
    assert accepted == [True, False]


@pytest.mark.parametrize("rate", [1, 2])
def test_equal_shapes_share_one_function(rate: int) -> None:
    shape = SAAShape(1, 8, 8, 32, 2, rate)
    (first, packed), (second, others) = (kernel(shape, cpus.AVX2, seed=seed) for seed in (0, 1))
    tvm.ir.assert_structural_equal(first, second)
    assert not np.array_equal(packed[-1], others[-1])


def test_offered_tilings_are_right(call: Call, here: Isa) -> None:
    shape = SAAShape(1, 8, 12, 48, 3, 4)
    offered = FAMILY.tilings_for(shape, here)
    assert offered[0] == FAMILY.default_for(shape, here, 1)
    assert len(offered) == len(set(offered)) > 20
    assert error(call, here, shape, offered[-1]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "multiply_add"),
    [(AVX512, r"vfmadd\w+ps.*%zmm"), (NEON, r"fmla\s+v\d+\.4s")],
    ids=["avx512", "neon"],
)
def test_other_cpus_get_their_vectors(assembly: Callable[..., str], target: dict[str, str], multiply_add: str) -> None:
    shape = SAAShape(1, 6, 6, 32, 2, 2)
    func, _ = kernel(shape, isa_of(target), threads=2)
    assert len(re.findall(multiply_add, assembly(func, target))) > 100
