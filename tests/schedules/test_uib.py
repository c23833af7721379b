"""The inverted bottleneck as one kernel, held against plain numpy in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from schedules.cpu.fused.uib import UIB, UIBShape
from schedules.cpu.generator import lowered
from schedules.machines.cpus import AVX2, AVX512, NEON, Isa
from schedules.spec import Epilogue

Call = Callable[..., np.ndarray]
RESIDUAL = Epilogue(("bias", "add residual"))


def shape(
    size: tuple[int, int, int, int],
    e: int,
    k: int,
    kernel: int = 3,
    stride: int = 1,
    epilogue: Epilogue = Epilogue(("bias",)),  # noqa: B008
) -> UIBShape:
    pad = kernel // 2
    around = (pad, pad, pad, pad) if stride == 1 else (pad - 1, pad, pad, pad - 1)  # as TensorFlow pads, if uneven
    return UIBShape(
        *size,
        kernel=(kernel, kernel),
        strides=(stride, stride),
        padding=around,
        e=e,
        k=k,
        activation="relu",
        epilogue=epilogue,
    )


def error(call: Call, isa: Isa, problem: UIBShape, threads: int = 1, **knobs: int) -> float:
    """Relative to the largest value."""
    random = np.random.RandomState(0)

    def normal(*size: int) -> np.ndarray:
        fan_in = np.prod(size[:-1]) if len(size) > 1 else 4
        return (random.standard_normal(size) / fan_in**0.5).astype("float32")

    weights = {"ex_w": normal(problem.c, problem.e), "ex_b": normal(problem.e)}
    weights |= {"dw_w": normal(*problem.kernel, problem.e), "dw_b": normal(problem.e)} if problem.kernel[0] > 1 else {}
    weights |= {"pr_w": normal(problem.e, problem.k), "pr_b": normal(problem.k)}
    x = random.standard_normal(problem.image).astype(isa.stored)
    others = [random.standard_normal(problem.result).astype(isa.stored) for _ in problem.epilogue.operands]
    family = UIB()
    tiling = dataclasses.replace(family.default_for(problem, isa, threads), **knobs)
    func, packed = lowered(family.loops(problem, isa, tiling, threads), weights, 1 + len(others))
    named = dict(zip(problem.epilogue.operands, others, strict=True))
    expected = family.reference_for(problem, {"x": x, **named, **weights})
    found = call(func, [x, *others, *packed], expected.shape).astype("float64")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "threads", "knobs"),
    [
        (shape((1, 14, 14, 24), 96, 24, epilogue=RESIDUAL), 1, {}),
        (shape((2, 9, 11, 20), 44, 13, kernel=5), 2, {"chunk": 2, "strip": 4}),  # rolls, odd channels
        (shape((1, 13, 7, 16), 48, 32, kernel=5, stride=2), 4, {"chunk": 1}),  # padded unevenly
        (shape((1, 7, 7, 32), 128, 32, kernel=7, epilogue=RESIDUAL), 2, {}),
        (shape((3, 2, 3, 5), 7, 5), 2, {}),
        (shape((1, 1, 1, 8), 32, 8), 1, {}),
        (shape((1, 8, 9, 24), 96, 24, kernel=1, epilogue=RESIDUAL), 2, {"chunk": 3}),  # without the depthwise one
    ],
)
def test_uib(call: Call, here: Isa, problem: UIBShape, threads: int, knobs: dict[str, int]) -> None:
    assert error(call, here, problem, threads, **knobs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("isa", [AVX512, AVX2, NEON], ids=lambda isa: isa.name)
def test_vectors_of_every_width(call: Call, isa: Isa) -> None:
    assert error(call, isa, shape((1, 9, 10, 22), 44, 17, stride=2), threads=2) < 1e-5


def test_in_float16(call: Call) -> None:
    assert error(call, NEON.storing("float16"), shape((1, 10, 6, 24), 72, 24, epilogue=RESIDUAL)) < 3e-3


def test_offered_tilings_are_right(call: Call, here: Isa) -> None:
    problem = shape((1, 10, 12, 24), 72, 24)
    offered = UIB().tilings_for(problem, here)
    assert len(offered) == len(set(offered)) > 10
    for index in (len(offered) // 2, -1):
        assert error(call, here, problem, **dataclasses.asdict(offered[index])) < 1e-5


@pytest.mark.parametrize(
    ("problem", "threads", "pays"),
    [
        (shape((1, 14, 14, 96), 192, 96), 1, True),
        (shape((1, 14, 14, 96), 192, 96), 2, True),
        (shape((1, 7, 7, 128), 512, 128, kernel=5), 1, True),
        (shape((1, 7, 7, 128), 512, 128, kernel=5), 2, False),  # of 7 rows each thread would expand 6
        (shape((2, 7, 7, 128), 512, 128, kernel=5), 2, True),  # an image each
        (shape((1, 56, 56, 32), 128, 32, kernel=1), 2, True),
        (shape((1, 14, 14, 128), 256, 128, kernel=1), 1, False),  # a cache holds the expanded map
    ],
)
def test_when_one_kernel_pays(problem: UIBShape, threads: int, pays: bool) -> None:
    assert UIB().pays(problem, threads) == pays
