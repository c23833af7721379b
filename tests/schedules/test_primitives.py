"""The primitives, held against plain numpy in float64: every vector width, both types, several threads, odd sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from schedules.cpu.generator import Arrays, Generator, lowered
from schedules.cpu.primitives.attention import Attention, AttentionShape, View
from schedules.cpu.primitives.conv import Conv, ConvShape
from schedules.cpu.primitives.depthwise import Depthwise, DepthwiseShape
from schedules.cpu.primitives.group_norm import GroupNorm, GroupNormShape
from schedules.cpu.primitives.linear import Linear, LinearShape
from schedules.cpu.primitives.matmul import Matmul, MatmulShape
from schedules.cpu.primitives.norm import LayerNorm, LayerNormShape
from schedules.cpu.primitives.pool import Mean, MeanShape, Pool, PoolShape
from schedules.cpu.primitives.softmax import Softmax, SoftmaxShape
from schedules.cpu.primitives.unrolling import at_a_time
from schedules.gpu import plan
from schedules.machines.cpus import AVX2, AVX512, NEON, SSE, Isa
from schedules.machines.gpus import GENERIC
from schedules.spec import Epilogue, KernelSpec, Tensor

Call = Callable[..., np.ndarray]
UNITS = {"avx512": AVX512, "avx2": AVX2, "sse": SSE, "neon": NEON, "half": NEON.storing("float16")}
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}  # of the largest result
EPILOGUES = [
    (),
    ("bias",),
    ("bias", "relu"),
    ("bias", "gelu"),
    ("bias", "silu", "multiply gate"),
    ("bias", "add other", "relu"),
    ("relu6", "bias", "add other"),
    ("relu", "scale"),
]


def normal(*size: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.RandomState(seed + sum(size)).standard_normal(size) * scale).astype(np.float32)


def operands(epilogue: Epilogue, result: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: normal(*result, seed=len(name)) for name in epilogue.operands}


def by_channel(epilogue: Epilogue, channels: int) -> dict[str, np.ndarray]:
    return {name: normal(channels, seed=ord(name)) for name in epilogue.weights}


def computed(
    call: Call,
    family: Generator,
    problem: Any,
    inputs: Arrays,
    weights: Arrays,
    unit: Isa,
    threads: int = 1,
    tiling: Any | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel makes, and what it should."""
    unit = unit.wide() if family.WIDE else unit
    stored = {name: array.astype(unit.stored) for name, array in inputs.items()}
    with np.errstate(all="ignore"):
        expected = family.reference_for(problem, {**stored, **weights})
    tiling = tiling or family.default_for(problem, unit, threads)
    func, packed = lowered(family.loops(problem, unit, tiling, threads), weights, len(inputs))
    return call(func, [*stored.values(), *packed], expected.shape), expected


def agree(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype in (np.float32, np.float16)
    tolerance = TOLERANCE[str(found.dtype)] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


# Depthwise ------------------------------------------------------------------------


def depthwise(shape: DepthwiseShape) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    inputs = {"x": normal(*shape.image), **operands(shape.epilogue, shape.result)}
    weights = {"w": normal(*shape.kernel, shape.c, scale=(shape.kernel[0] * shape.kernel[1]) ** -0.5)}
    return inputs, {**weights, **by_channel(shape.epilogue, shape.c)}


def spec_of(shape: DepthwiseShape) -> KernelSpec:
    """The spec that a graph would have of it."""
    out = Tensor("out", shape.result, layout="NHWC")
    others = [replace(out, name=name) for name in shape.epilogue.operands]
    weights = [Tensor("w", (*shape.kernel, shape.c)), *(Tensor(name, (shape.c,)) for name in shape.epilogue.weights)]
    attrs = {"strides": shape.strides, "padding": shape.padding, "dilation": shape.dilation}
    x = Tensor("x", shape.image, layout="NHWC")
    return KernelSpec.of("depthwise", [x, *others], weights, [out], attrs, shape.epilogue.steps)


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (DepthwiseShape(1, 14, 14, 32, (3, 3), padding=(1, 1, 1, 1)), 1),
        (DepthwiseShape(2, 15, 17, 21, (3, 3), (2, 2), (0, 0, 1, 1)), 2),  # TensorFlow's "same"
        (DepthwiseShape(1, 11, 6, 40, (5, 5), (2, 2), (1, 2, 2, 1)), 4),
        (DepthwiseShape(1, 4, 5, 3, (7, 7), padding=(3, 3, 3, 3)), 2),  # the window is wider than the image
    ],
)
def test_depthwise(call: Call, shape: DepthwiseShape, threads: int, unit: str) -> None:
    agree(*computed(call, Depthwise(), shape, *depthwise(shape), UNITS[unit], threads))


@pytest.mark.parametrize(
    "shape",
    [
        DepthwiseShape(1, 9, 30, 24, (1, 1), (1, 1)),
        DepthwiseShape(3, 13, 12, 17, (11, 11), (1, 1), (5, 5, 5, 5)),
        DepthwiseShape(1, 12, 25, 16, (2, 3), (1, 2), (1, 0, 0, 2)),
        DepthwiseShape(1, 16, 33, 16, (3, 5), (1, 1), (2, 4, 2, 4), (2, 2)),
        DepthwiseShape(1, 10, 21, 8, (3, 3), (2, 2), (3, 2, 3, 2), (3, 2)),
        DepthwiseShape(1, 2, 2, 5, (3, 3), (2, 2), (2, 2, 2, 2)),  # windows that see no more than a corner
        DepthwiseShape(1, 3, 3, 1, (3, 3), (1, 1), (1, 1, 1, 1)),
        DepthwiseShape(1, 9, 40, 64, (3, 3), (1, 1), (0, 0, 0, 0)),
    ],
)
def test_any_window(call: Call, here: Isa, shape: DepthwiseShape) -> None:
    agree(*computed(call, Depthwise(), shape, *depthwise(shape), here, threads=2))
    assert Depthwise().problem(spec_of(shape)) == shape


@pytest.mark.parametrize("unit", ["avx2", "half"])
@pytest.mark.parametrize(
    "steps", [("beside",), ("bias", "relu", "beside", "multiply other", "tanh"), ("silu", "scale", "beside")]
)
def test_a_depthwise_convolution_beside_what_it_reads(call: Call, steps: tuple[str, ...], unit: str) -> None:
    shape = DepthwiseShape(2, 5, 9, 20, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(steps))
    agree(*computed(call, Depthwise(), shape, *depthwise(shape), UNITS[unit], threads=2))
    assert shape.result == (2, 5, 9, 40) and Depthwise().problem(spec_of(shape)) == shape
    assert Depthwise().problem(spec_of(replace(shape, strides=(2, 2)))) is None
    assert Depthwise().problem(spec_of(replace(shape, padding=(0, 0, 0, 0)))) is None


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["avx2", "half"])
@pytest.mark.parametrize("steps", EPILOGUES, ids=lambda steps: "+".join(steps) or "nothing")
def test_epilogue_of_depthwise(call: Call, steps: tuple[str, ...], unit: str) -> None:
    shape = DepthwiseShape(1, 5, 9, 20, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(steps))
    agree(*computed(call, Depthwise(), shape, *depthwise(shape), UNITS[unit]))
    assert Depthwise().problem(spec_of(shape)) == shape


def test_only_what_sees_it_becomes_nan(call: Call, here: Isa) -> None:
    shape = DepthwiseShape(1, 9, 9, 18, (3, 3), padding=(1, 1, 1, 1))
    inputs, weights = depthwise(shape)
    inputs["x"][0, 4, 4, 17], inputs["x"][0, 0, 0, 2] = np.nan, np.inf
    found, expected = computed(call, Depthwise(), shape, inputs, weights, here)
    assert np.isnan(found).sum() == 9
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_depthwise_declines() -> None:
    shape = DepthwiseShape(1, 5, 9, 20, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(("add other",)))
    spec = spec_of(shape)
    assert Depthwise().accepts(spec, AVX2)
    assert not Depthwise().accepts(replace(spec, epilogue=Epilogue(("add other", "cube"))), AVX2)
    assert not Depthwise().accepts(replace(spec, weights=(Tensor("w", (3, 3, 40)),)), AVX2)  # a multiplier
    small = Tensor("other", (1, 1, 9, 20), layout="NHWC")
    assert not Depthwise().accepts(replace(spec, inputs=(spec.x, small)), AVX2)


# Linear ---------------------------------------------------------------------------


def linear(shape: LinearShape) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    inputs = {"x": normal(*shape.lead, shape.c), **operands(shape.epilogue, shape.result)}
    return inputs, {"w": normal(shape.c, shape.k, scale=shape.c**-0.5), **by_channel(shape.epilogue, shape.k)}


def linear_spec(shape: LinearShape) -> KernelSpec:
    out = Tensor("out", shape.result)
    others = [replace(out, name=name) for name in shape.epilogue.operands]
    weights = [Tensor("w", (shape.c, shape.k)), *(Tensor(name, (shape.k,)) for name in shape.epilogue.weights)]
    return KernelSpec.of(
        "linear", [Tensor("x", (*shape.lead, shape.c)), *others], weights, [out], None, shape.epilogue.steps
    )


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (LinearShape((2, 25), 30, 77), 2),
        (LinearShape((1,), 70, 131), 4),
        (LinearShape((3, 1, 1), 13, 5), 1),
        (LinearShape((97,), 24, 16), 4),
    ],
)
def test_linear(call: Call, shape: LinearShape, threads: int, unit: str) -> None:
    agree(*computed(call, Linear(), shape, *linear(shape), UNITS[unit], threads))
    assert Linear().problem(linear_spec(shape)) == shape


@pytest.mark.parametrize("steps", EPILOGUES, ids=lambda steps: "+".join(steps) or "nothing")
def test_epilogue_of_linear(call: Call, steps: tuple[str, ...]) -> None:
    shape = LinearShape((2, 7), 12, 21, Epilogue(steps))
    agree(*computed(call, Linear(), shape, *linear(shape), AVX2, 2))
    assert Linear().problem(linear_spec(shape)) == shape


@pytest.mark.parametrize(
    "knobs", [{"bands": 1, "groups": 1, "chunk": 7}, {"bands": 4, "chunk": 3}, {"bands": 3, "groups": 2, "chunk": 40}]
)
def test_rows_in_bands_and_chunks(call: Call, here: Isa, knobs: dict[str, int]) -> None:
    shape = LinearShape((2, 20), 18, 90, Epilogue(("bias", "add other")))
    tiling = replace(Linear().default_for(shape, here, 1), **knobs)
    agree(*computed(call, Linear(), shape, *linear(shape), here, 4, tiling))


@pytest.mark.parametrize("rows", [1, 3, 5, 200])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8])
def test_all_threads_work(rows: int, threads: int) -> None:
    """And few rows share the columns, so that each weight is read once."""
    tiling = Linear().default_for(LinearShape((rows,), 512, 1024), AVX2, threads)
    assert tiling.bands * tiling.groups == threads
    assert tiling.bands == 1 or rows > 5


def test_a_row_more_costs_no_turn_of_its_own() -> None:
    """Of 197 rows one thread would have 98 and the other 99: in turns of 98 it would do the work of 196."""
    shape = LinearShape((197,), 64, 64)
    func = Linear().loops(shape, AVX512, Linear().default_for(shape, AVX512, 2), 2).function()
    turns = re.findall(r"for \w+ in [\w.]+\((.*)\):", str(func))
    assert turns and all(count.isdigit() for count in turns), "all threads take as many turns"


def test_rows_of_two_threads_are_alike(call: Call, here: Isa) -> None:
    """Some are made by both, in other tiles: to the last bit the same as by one, whoever is last."""
    shape = LinearShape((49,), 40, 70, Epilogue(("bias", "gelu")))
    whole = Linear().default_for(shape, here, 1)
    made = [computed(call, Linear(), shape, *linear(shape), here, 1, replace(whole, bands=n))[0] for n in (1, 2, 3, 5)]
    assert all(np.array_equal(each, made[0]) for each in made)


@pytest.mark.parametrize(("rows", "parts"), [(197, 2), (49, 2), (3, 2), (7, 4), (64, 4), (1, 1), (785, 3)])
@pytest.mark.parametrize("most", [8, 50, 1000])
def test_turns_are_even_and_stay_in_their_part(rows: int, parts: int, most: int) -> None:
    size, largest = at_a_time(rows, parts, most), -(-rows // parts)
    assert 1 <= size <= min(most, rows // parts)
    turns = -(-largest // size)
    assert turns * size < largest + turns, "as little as can be is done twice"


@pytest.mark.parametrize("op", ["attention", "layer_norm", "softmax"])
def test_no_row_is_made_by_two_threads(op: str) -> None:
    """Its sums would begin elsewhere, and its last bit would depend on who is last."""
    family, problem = {
        "attention": (Attention(), AttentionShape(1, 49, 49, 1, 16, 16, 0.25)),
        "layer_norm": (LayerNorm(), LayerNormShape((49,), 40)),
        "softmax": (Softmax(), SoftmaxShape((49,), 49)),
    }[op]
    tiling = family.default_for(problem, AVX512, 2)
    size = tiling.block if op == "attention" else tiling.chunk
    assert tiling.bands == 2 and size <= 24
    # Not even with a tiling from elsewhere: its turns are cut for the smaller band.
    larger = replace(tiling, **{"block" if op == "attention" else "chunk": 49})
    func = str(family.loops(problem, AVX512, larger, 2).function())
    assert "- 13" in func and "- 25" not in func and "- 49" not in func


def test_a_row_that_is_not_a_number_stays_alone(call: Call, here: Isa) -> None:
    shape = LinearShape((9,), 20, 30)
    inputs, weights = linear(shape)
    inputs["x"][4, 7], inputs["x"][6, 7] = np.nan, np.inf
    found, expected = computed(call, Linear(), shape, inputs, weights, here)
    assert np.isnan(found[4]).all() and np.isnan(found).sum() == 30
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_linear_declines() -> None:
    spec = linear_spec(LinearShape((9, 4), 20, 30))
    assert Linear().accepts(spec, AVX2)
    assert not Linear().accepts(replace(spec, inputs=(replace(spec.x, strides=(160, 40, 2)),)), AVX2)
    assert not Linear().accepts(replace(spec, weights=(Tensor("w", (30, 20)),)), AVX2)


# Attention ------------------------------------------------------------------------


def attention(shape: AttentionShape) -> dict[str, np.ndarray]:
    n, t, s, heads = shape.n, shape.t, shape.s, shape.heads
    inputs = {"q": normal(n, t, heads, shape.d), "k": normal(n, s, heads, shape.d, seed=1)}
    inputs["v"] = normal(n, s, heads, shape.dv, seed=2)
    return inputs | ({"mask": normal(*shape.mask)} if shape.mask else {})


def attention_spec(shape: AttentionShape) -> KernelSpec:
    inputs = [Tensor(name, array.shape) for name, array in attention(shape).items()]
    return KernelSpec.of("attention", inputs, [], [Tensor("out", shape.result)], {"scale": shape.scale})


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (AttentionShape(1, 37, 37, 3, 16, 16, 0.25), 2),
        (AttentionShape(2, 9, 21, 2, 20, 12, 0.3), 4),
        (AttentionShape(1, 1, 50, 1, 7, 5, 0.5, (1, 1, 1, 50)), 2),
    ],
)
def test_attention(call: Call, shape: AttentionShape, threads: int, unit: str) -> None:
    agree(*computed(call, Attention(), shape, attention(shape), {}, UNITS[unit], threads))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [(19, 23), (4, 19, 23), (3, 1, 1, 23), (3, 4, 19, 1), (1, 4, 1, 1)])
def test_masks_are_repeated_along_extents_of_one(call: Call, here: Isa, mask: tuple[int, ...]) -> None:
    whole = (1,) * (4 - len(mask)) + mask
    shape = AttentionShape(3, 19, 23, 4, 8, 8, 0.4, whole)
    agree(*computed(call, Attention(), shape, attention(shape), {}, here, 2))
    spec = attention_spec(shape)
    assert Attention().problem(replace(spec, inputs=(*spec.inputs[:3], Tensor("mask", mask)))) == shape


def test_long_rows_of_scores(call: Call, here: Isa) -> None:
    """A few queries at a time, and the last block moved up."""
    shape = AttentionShape(1, 83, 700, 1, 24, 40, 0.2)
    assert 1 < Attention().default_for(shape, here, 1).block < 20
    agree(*computed(call, Attention(), shape, attention(shape), {}, here))


def test_large_scores_are_safe(call: Call, here: Isa) -> None:
    shape = AttentionShape(1, 12, 12, 1, 16, 16, 40.0)
    found, expected = computed(call, Attention(), shape, attention(shape), {}, here)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_masked_keys_have_no_share_at_all(call: Call, here: Isa) -> None:
    shape = AttentionShape(1, 9, 21, 2, 16, 16, 0.25, (1, 1, 9, 21))
    inputs = attention(shape)
    inputs["mask"][..., 5:] = -np.inf
    inputs["v"][:, 5:] = 1e38
    agree(*computed(call, Attention(), shape, inputs, {}, here))


def test_a_query_that_sees_no_key_sees_all_alike(call: Call, here: Isa) -> None:
    """Where a mask has the smallest number and not minus infinity."""
    shape = AttentionShape(1, 9, 21, 2, 16, 16, 0.25, (1, 1, 1, 21))
    inputs = {**attention(shape), "mask": np.full((1, 1, 1, 21), np.finfo(np.float32).min)}
    agree(*computed(call, Attention(), shape, inputs, {}, here))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_attention_keeps_what_is_not_a_number(call: Call, here: Isa, name: str, value: float) -> None:
    """As PyTorch does: a query, a key or a value that is none makes just the results NaN that depend on it."""
    shape = AttentionShape(1, 9, 21, 2, 16, 16, 0.25, (1, 2, 9, 21))
    inputs = attention(shape)
    inputs[name].reshape(-1)[37] = value
    found, expected = computed(call, Attention(), shape, inputs, {}, here)
    assert not np.isfinite(expected).all() or (name, value) == ("mask", -np.inf)
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Two images of 21 tokens of two heads, each with a key, a value and a query, behind which something else lies.
TOGETHER = (2, 21, 2, 60)
INSIDE = (View(TOGETHER, 32, 2520, 240, 60), View(TOGETHER, 0, 2520, 120, 60), View(TOGETHER, 20, 2520, 120, 60))


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["avx512", "sse", "half"])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_reads_views(call: Call, unit: str, threads: int) -> None:
    """Every second token is a query."""
    shape = AttentionShape(2, 11, 21, 2, 20, 12, 0.3, views=INSIDE)
    found, expected = computed(
        call, Attention(), shape, dict.fromkeys("qkv", normal(*TOGETHER)), {}, UNITS[unit], threads
    )
    agree(found, expected)
    x = normal(*TOGETHER).astype(UNITS[unit].stored)
    own = {"q": x[:, ::2, :, 32:52], "k": x[..., :20], "v": x[..., 20:32]}
    np.testing.assert_array_equal(expected, Attention().reference_for(replace(shape, views=()), own))


def test_views_are_told_by_attributes() -> None:
    shape = AttentionShape(2, 11, 21, 2, 20, 12, 0.3, views=INSIDE)
    places = [(view.offset, view.image, view.token, view.head) for view in INSIDE]
    how = {"scale": 0.3, "keys": 21, "width": 20, "views": places}
    spec = KernelSpec.of(
        "attention", [Tensor(name, TOGETHER) for name in "qkv"], [], [Tensor("out", shape.result)], how
    )
    assert Attention().problem(KernelSpec.parse(spec.text)) == shape
    own = attention_spec(replace(shape, views=()))
    assert (Attention().flops(spec), Attention().bytes(spec)) == (Attention().flops(own), Attention().bytes(own))
    beyond = KernelSpec.of(
        "attention", spec.inputs, [], spec.outputs, how | {"views": [*places[:2], (49, *places[2][1:])]}
    )
    assert not Attention().accepts(beyond, AVX2)
    assert not plan.accepts(spec, GENERIC)


def test_what_attention_declines() -> None:
    spec = attention_spec(AttentionShape(2, 9, 21, 2, 20, 12, 0.3))
    assert Attention().accepts(spec, AVX2)
    q, k, v = spec.inputs
    assert not Attention().accepts(replace(spec, inputs=(q, replace(k, shape=(2, 21, 1, 20)), v)), AVX2)
    assert not Attention().accepts(replace(spec, inputs=(q, k, v, Tensor("mask", (2, 2, 9, 20)))), AVX2)
    assert not Attention().accepts(replace(spec, inputs=(replace(q, strides=(1, 1, 1, 1)), k, v)), AVX2)


# Convolutions in groups -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("how", "parts", "threads"),
    [
        ({"h": 9, "w": 8, "c": 24, "k": 24, "strides": (1, 1), "padding": (1, 1, 1, 1)}, 3, 2),
        ({"h": 7, "w": 5, "c": 10, "k": 40, "strides": (2, 2), "padding": (1, 1, 1, 1), "dilation": (1, 2)}, 5, 4),
        ({"h": 3, "w": 3, "c": 4, "k": 8, "strides": (1, 1), "padding": (1, 1, 1, 1)}, 4, 2),  # a multiplier of two
        ({"h": 4, "w": 6, "c": 40, "k": 36, "kernel": (1, 1)}, 2, 1),
    ],
)
def test_conv_in_groups(call: Call, how: dict[str, Any], parts: int, threads: int, unit: str) -> None:
    epilogue = Epilogue(("bias", "add other", "relu"))
    shape = ConvShape(**{"n": 2, "kernel": (3, 3), **how}, parts=parts, epilogue=epilogue)
    within = shape.c // parts
    inputs = {"x": normal(*shape.image), **operands(epilogue, shape.result)}
    weights = {"w": normal(*shape.kernel, within, shape.k, scale=within**-0.5 / 3), **by_channel(epilogue, shape.k)}
    agree(*computed(call, Conv(), shape, inputs, weights, UNITS[unit], threads))


def test_groups_of_a_convolution_do_not_see_each_other(call: Call, here: Isa) -> None:
    shape = ConvShape(n=1, h=4, w=4, c=6, kernel=(1, 1), k=6, parts=3, epilogue=Epilogue())
    x = normal(*shape.image)
    x[0, 0, 0, 2] = np.nan
    found, expected = computed(call, Conv(), shape, {"x": x}, {"w": normal(1, 1, 2, 6)}, here)
    assert np.isnan(found).sum() == 2
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("size", "fetches"), [(7, True), (56, False)])
def test_weights_are_fetched_ahead_where_few_rows_pass(size: int, fetches: bool) -> None:
    shape = ConvShape(n=1, h=size, w=size, c=64, kernel=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1), k=256)
    loops = Conv().loops(shape, AVX512, Conv().default_for(shape, AVX512, 1), 1)
    assert ("prefetch" in str(loops.function())) == fetches


# Products of two inputs -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (MatmulShape((2, 3), 17, 49, 17), 2),
        (MatmulShape((), 9, 5, 70, Epilogue(("bias", "relu"))), 4),  # one item: its rows are divided
        (MatmulShape((3,), 1, 200, 3, Epilogue(("scale", "add other"))), 2),
        (MatmulShape((1, 1), 64, 96, 128), 1),
    ],
)
def test_matmul(call: Call, shape: MatmulShape, threads: int, unit: str) -> None:
    inputs = {
        "x": normal(*shape.lead, shape.m, shape.c, scale=shape.c**-0.5),
        "y": normal(*shape.lead, shape.c, shape.k, seed=1),
        **operands(shape.epilogue, shape.result),
    }
    agree(*computed(call, Matmul(), shape, inputs, by_channel(shape.epilogue, shape.k), UNITS[unit], threads))


def test_a_lane_that_is_not_wanted_makes_nothing(call: Call, here: Isa) -> None:
    """What is not a number stays in its row and its column."""
    shape = MatmulShape((), 6, 4, 5)
    inputs = {"x": normal(6, 4), "y": normal(4, 5)}
    inputs["x"][2, 1], inputs["y"][3, 4] = np.nan, np.inf
    found, expected = computed(call, Matmul(), shape, inputs, {}, here)
    assert np.isnan(found[2]).all() and not np.isnan(found[[0, 1, 3, 4, 5], :4]).any()
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Norm and softmax -----------------------------------------------------------------


def layer_norm(shape: LayerNormShape) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return {"x": normal(*shape.whole)}, {"g": 1 + normal(shape.c), "b": normal(shape.c, seed=1)}


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (LayerNormShape((2, 25), 48), 2),
        (LayerNormShape((19,), 37, 1e-3), 4),
        (LayerNormShape((1, 3), 5), 1),
        (LayerNormShape((3,), 421), 2),  # rows so long that they are loops in some widths
        (LayerNormShape((2,), 1605), 1),  # and in all
        (LayerNormShape((3,), 1), 1),
    ],
)
def test_layer_norm(call: Call, shape: LayerNormShape, threads: int, unit: str) -> None:
    agree(*computed(call, LayerNorm(), shape, *layer_norm(shape), UNITS[unit], threads))


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (GroupNormShape(2, 5, 6, 48, 1), 2),
        (GroupNormShape(1, 7, 3, 36, 4, 1e-3), 4),
        (GroupNormShape(3, 1, 2, 5, 5), 1),
        (GroupNormShape(1, 3, 4, 300, 3), 2),  # more channels than sums fit into registers
    ],
)
def test_group_norm(call: Call, shape: GroupNormShape, threads: int, unit: str) -> None:
    inputs = {"x": normal(*shape.whole) + 40}  # squares would cancel
    weights = {"g": 1 + normal(shape.c), "b": normal(shape.c, seed=1)}
    if unit == "half":
        inputs = {"x": normal(*shape.whole)}
    agree(*computed(call, GroupNorm(), shape, inputs, weights, UNITS[unit], threads))


def test_a_row_with_a_large_mean(call: Call, here: Isa) -> None:
    shape = LayerNormShape((9,), 45)
    inputs, weights = layer_norm(shape)
    found, expected = computed(call, LayerNorm(), shape, {"x": inputs["x"] + 50}, weights, here)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (SoftmaxShape((2, 25), 48), 2),
        (SoftmaxShape((19,), 37), 4),
        (SoftmaxShape((1, 3), 5), 1),
        (SoftmaxShape((1,), 1000), 2),
        (SoftmaxShape((3,), 1), 1),
    ],
)
def test_softmax(call: Call, shape: SoftmaxShape, threads: int, unit: str) -> None:
    inputs = {"x": 3 * normal(*shape.whole)}
    agree(*computed(call, Softmax(), shape, inputs, {}, UNITS[unit], threads))


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 200.0, -200.0, 3e38])
@pytest.mark.parametrize("place", [0, 20, 36])
def test_rows_with_odd_numbers(call: Call, here: Isa, value: float, place: int) -> None:
    """NaN and infinities spoil their row and no other, as in PyTorch; large numbers spoil nothing."""
    for family, shape in ((LayerNorm(), LayerNormShape((19,), 37)), (Softmax(), SoftmaxShape((19,), 37))):
        inputs, weights = {"x": normal(19, 37)}, layer_norm(LayerNormShape((19,), 37))[1]
        inputs["x"][7, place] = value
        if value == 3e38 and isinstance(family, LayerNorm):
            continue  # its square is no number of float32
        found, expected = computed(call, family, shape, inputs, weights if isinstance(family, LayerNorm) else {}, here)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_softmax_of_nothing_but_minus_infinity(call: Call, here: Isa) -> None:
    found, _ = computed(call, Softmax(), SoftmaxShape((3,), 9), {"x": np.full((3, 9), -np.inf, np.float32)}, {}, here)
    assert np.isnan(found).all()


def test_specs_of_rows() -> None:
    x, g, b = Tensor("x", (2, 25, 48)), Tensor("g", (48,)), Tensor("b", (48,))
    norm = KernelSpec.of("layer_norm", [x], [g, b], [replace(x, name="out")], {"eps": 1e-6})
    assert LayerNorm().problem(norm) == LayerNormShape((2, 25), 48, 1e-6)
    assert not LayerNorm().accepts(replace(norm, weights=(g, replace(b, shape=(25,)))), AVX2)
    softmax = KernelSpec.of("softmax", [x], [], [replace(x, name="out")])
    assert Softmax().problem(softmax) == SoftmaxShape((2, 25), 48)
    assert not Softmax().accepts(replace(softmax, inputs=(replace(x, strides=(1, 2, 50)),)), AVX2)


# Pooling --------------------------------------------------------------------------

THREE, HALVED, ONE = (3, 3), (2, 2), (1, 1, 1, 1)


def pool(shape: PoolShape) -> dict[str, np.ndarray]:
    return {"x": normal(*shape.image), **operands(shape.epilogue, shape.result)}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"),
    [
        (PoolShape(1, 15, 14, 40, THREE, HALVED, ONE), 2),
        (PoolShape(2, 7, 9, 21, THREE, HALVED, (0, 0, 1, 1), mode="avg"), 4),
        (PoolShape(1, 7, 9, 5, THREE, (1, 1), ONE, mode="avg", count_padding=True), 1),
    ],
)
def test_pool(call: Call, shape: PoolShape, threads: int, unit: str) -> None:
    agree(*computed(call, Pool(), shape, pool(shape), {}, UNITS[unit], threads))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize(
    "shape",
    [
        PoolShape(1, 8, 8, 16, (2, 2), HALVED),
        PoolShape(1, 13, 30, 8, (13, 13), (1, 1), (6, 6, 6, 6)),
        PoolShape(2, 9, 11, 12, (2, 3), (3, 1), (1, 0, 0, 2), (2, 3)),
        PoolShape(1, 5, 30, 3, THREE, HALVED, ONE, epilogue=Epilogue(("add other", "relu"))),
    ],
)
def test_any_window_of_pooling(call: Call, here: Isa, shape: PoolShape, mode: str) -> None:
    shape = replace(shape, mode=mode)
    agree(*computed(call, Pool(), shape, pool(shape), {}, here, threads=2))


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("unit", UNITS)
def test_pooling_keeps_nan(call: Call, mode: str, unit: str) -> None:
    """Wherever in its window it is; and what is nothing but minus infinity."""
    shape = PoolShape(1, 9, 11, 17, THREE, (1, 1), ONE, mode=mode)
    inputs = pool(shape)
    inputs["x"][0, 4, 4, 3], inputs["x"][0, 0, 0, 16], inputs["x"][0, :, :, 2] = np.nan, np.inf, -np.inf
    found, expected = computed(call, Pool(), shape, inputs, {}, UNITS[unit])
    assert np.isnan(found).sum() == 9
    np.testing.assert_allclose(found, expected, atol=2e-3 if unit == "half" else 1e-5)


def test_large_windows_add_up_in_float32(call: Call) -> None:
    """Sums of hundreds of numbers of one sign would lose more than a rounding in float16."""
    window, padding = (13, 13), (6, 6, 6, 6)
    inputs = {"x": 3 + normal(1, 14, 14, 8)}
    mean = PoolShape(1, 14, 14, 8, window, (1, 1), padding, mode="avg", count_padding=True)
    taps = DepthwiseShape(1, 14, 14, 8, window, (1, 1), padding, epilogue=Epilogue())
    weights = {"w": np.full((13, 13, 8), 1 / 128, np.float32)}
    for family, shape, packed in ((Pool(), mean, {}), (Depthwise(), taps, weights)):
        found, expected = computed(call, family, shape, inputs, packed, UNITS["half"])
        assert np.abs(found / expected - 1).max() < 2**-11


def test_specs_of_pooling() -> None:
    shape = PoolShape(1, 15, 14, 40, THREE, HALVED, ONE, mode="avg", count_padding=True)
    x, out = (Tensor(name, extents, layout="NHWC") for name, extents in (("x", shape.image), ("out", shape.result)))
    attrs = {"mode": "avg", "kernel": THREE, "strides": HALVED, "padding": ONE, "count_padding": True}
    spec = KernelSpec.of("pool", [x], [], [out], attrs)
    assert Pool().problem(spec) == shape
    assert not Pool().accepts(replace(spec, outputs=(replace(out, shape=(1, 9, 7, 40)),)), AVX2)  # rounded up
    mean = KernelSpec.of("mean", [x], [], [Tensor("out", (1, 40))])
    assert Mean().problem(mean) == MeanShape(1, 15, 14, 40)
    assert not Mean().accepts(replace(mean, outputs=(Tensor("out", (40,)),)), AVX2)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("shape", "threads"), [(MeanShape(1, 7, 7, 84), 2), (MeanShape(3, 5, 2, 21), 4), (MeanShape(1, 1, 3, 3), 1)]
)
def test_mean(call: Call, shape: MeanShape, threads: int, unit: str) -> None:
    inputs = {"x": normal(shape.n, shape.h, shape.w, shape.c)}
    inputs["x"][0, 0, 0, 1] = np.nan
    found, expected = computed(call, Mean(), shape, inputs, {}, UNITS[unit], threads)
    assert np.isnan(found).sum() == 1
    agree(np.nan_to_num(found), np.nan_to_num(expected))


# What follows ---------------------------------------------------------------------

WINDOW: Any = {"kernel": THREE, "padding": ONE}
# Of primitives whose loops leave all of it to the epilogue; each in one type.
WHOLE = {
    "avx2": Epilogue(("bias", "scale", "silu", "multiply gate", "add other")),
    "half": Epilogue(("add other", "relu", "scale", "bias")),
}
GATED = Epilogue(("bias", "multiply gate", "relu", "add other"))


def whole_spec(
    op: str, inputs: Arrays, weights: Arrays, result: tuple[int, ...], attrs: dict[str, Any], epilogue: Epilogue
) -> KernelSpec:
    layout = "NHWC" if op in ("pool", "mean", "conv", "depthwise", "group_norm") else ""
    tensors = [Tensor(name, each.shape, layout=layout if each.ndim == 4 else "") for name, each in inputs.items()]
    out = Tensor("out", result, layout=layout if len(result) == 4 else "")
    named = [Tensor(name, each.shape) for name, each in weights.items()]
    return KernelSpec.of(op, tensors, named, [out], attrs, epilogue.steps)


@pytest.mark.slow
@pytest.mark.parametrize("unit", WHOLE)
@pytest.mark.parametrize("op", ["attention", "layer_norm", "group_norm", "softmax", "pool", "mean"])
def test_whole_epilogue(call: Call, op: str, unit: str) -> None:
    epilogue, rows = WHOLE[unit], {"x": normal(2, 7, 21)}
    heads = AttentionShape(2, 9, 21, 2, 20, 12, 0.3, epilogue=epilogue)
    family, shape, inputs, result, attrs = {
        "attention": (Attention(), heads, attention(heads), heads.result, {"scale": 0.3}),
        "layer_norm": (LayerNorm(), LayerNormShape((2, 7), 21, 1e-5, epilogue), rows, (2, 7, 21), {"eps": 1e-5}),
        "group_norm": (
            *(GroupNorm(), GroupNormShape(2, 3, 4, 21, 3, 1e-5, epilogue)),
            *({"x": normal(2, 3, 4, 21)}, (2, 3, 4, 21), {"eps": 1e-5, "groups": 3}),
        ),
        "softmax": (Softmax(), SoftmaxShape((2, 7), 21, epilogue), rows, (2, 7, 21), {}),
        "pool": (
            *(Pool(), PoolShape(2, 3, 4, 21, **WINDOW, epilogue=epilogue)),
            *({"x": normal(2, 3, 4, 21)}, (2, 3, 4, 21), {"mode": "max", **WINDOW}),
        ),
        "mean": (Mean(), MeanShape(2, 3, 4, 21, epilogue), {"x": normal(2, 3, 4, 21)}, (2, 21), {}),
    }[op]
    weights = by_channel(epilogue, result[-1])
    if op.endswith("norm"):  # whose own bias is `b`
        weights = {"g": 1 + normal(21), "b": normal(21, seed=1), "s": weights["s"], "bias": weights["b"]}
    inputs = {**inputs, **operands(epilogue, result)}
    agree(*computed(call, family, shape, inputs, weights, UNITS[unit], 2))
    spec = whole_spec(op, inputs, weights, result, attrs, epilogue)
    assert family.problem(spec) == shape
    assert not family.accepts(replace(spec, epilogue=Epilogue((*epilogue.steps, "cube"))), AVX2)
    assert not family.accepts(replace(spec, weights=(*spec.weights[:-1], Tensor("b", (20,)))), AVX2)


@pytest.mark.parametrize(("op", "unit"), [("conv", "avx2"), ("depthwise", "half"), ("pool", "avx2")])
def test_gates_of_one_number_an_image_and_channel(call: Call, op: str, unit: str) -> None:
    gated: Any = {**WINDOW, "epilogue": GATED, "gates": ("gate",)}
    family, shape, weights = {
        "conv": (Conv(), ConvShape(n=2, h=5, w=6, c=4, k=21, **gated), {"w": normal(3, 3, 4, 21, scale=1 / 6)}),
        "depthwise": (Depthwise(), DepthwiseShape(2, 5, 6, 21, **gated), {"w": normal(3, 3, 21, scale=1 / 3)}),
        "pool": (Pool(), PoolShape(2, 5, 6, 21, mode="avg", **gated), {}),
    }[op]
    weights = {**weights, **by_channel(GATED, 21)}
    inputs = {"x": normal(*shape.image), "gate": normal(2, 1, 1, 21), "other": normal(*shape.result)}
    agree(*computed(call, family, shape, inputs, weights, UNITS[unit], 2))
    attrs = {"mode": "avg", **WINDOW} if op == "pool" else {"padding": ONE}
    spec = whole_spec(op, inputs, weights, shape.result, attrs, GATED)
    assert family.problem(spec) == shape
    for extents in [(1, 1, 1, 21), (2, 1, 1, 1), (2, 1, 6, 21)]:
        gate = Tensor("gate", extents, layout="NHWC")
        assert not family.accepts(replace(spec, inputs=(spec.x, gate, spec.inputs[2])), AVX2)


# All ------------------------------------------------------------------------------

TAPS = DepthwiseShape(1, 9, 12, 40, (5, 5), (2, 2), (1, 1, 2, 2))
ROWS = LinearShape((2, 37), 20, 70)
NORM = LayerNormShape((300,), 41)
WINDOWS = PoolShape(1, 15, 14, 40, THREE, HALVED, ONE)
TOKENS = AttentionShape(1, 43, 29, 2, 24, 16, 0.3)


IMAGE = Tensor("x", (1, 5, 6, 20), layout="NHWC")
SEQUENCE = Tensor("x", (2, 5, 20))
HEADS = Tensor("q", (1, 5, 2, 20))
SPECS = [
    KernelSpec.of("depthwise", [IMAGE], [Tensor("w", (1, 1, 20)), Tensor("b", (20,))], [IMAGE], None, ["bias"]),
    KernelSpec.of(
        "linear", [SEQUENCE, replace(SEQUENCE, name="y")], [Tensor("w", (20, 20))], [SEQUENCE], None, ["add y"]
    ),
    KernelSpec.of(
        "attention", [HEADS, replace(HEADS, name="k"), replace(HEADS, name="v")], [], [HEADS], {"scale": 0.2}
    ),
    KernelSpec.of("layer_norm", [SEQUENCE], [Tensor("g", (20,)), Tensor("b", (20,))], [SEQUENCE], {"eps": 1e-5}),
    KernelSpec.of("softmax", [SEQUENCE], [], [SEQUENCE]),
    KernelSpec.of("pool", [IMAGE], [], [IMAGE], {"mode": "avg", "kernel": (3, 3), "padding": (1, 1, 1, 1)}),
    KernelSpec.of("mean", [IMAGE], [], [Tensor("out", (1, 20))]),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_a_spec_is_all_it_takes(call: Call, spec: KernelSpec, dtype: str) -> None:
    families = (Depthwise(), Linear(), Attention(), LayerNorm(), Softmax(), Pool(), Mean())
    (family,) = (each for each in families if each.accepts(spec, NEON))
    spec = replace(
        spec,
        inputs=tuple(replace(each, dtype=dtype) for each in spec.inputs),
        outputs=tuple(replace(each, name="out", dtype=dtype) for each in spec.outputs),
    )
    inputs = {each.name: normal(*each.shape, seed=len(each.name)).astype(dtype) for each in spec.inputs}
    weights = {each.name: normal(*each.shape, scale=0.2) for each in spec.weights}
    func, packed = family.lower(spec, weights, NEON, threads=2)
    assert [str(param.dtype) for param in (*func.params[: len(inputs)], func.params[-1])] == [dtype] * (len(inputs) + 1)
    agree(call(func, [*inputs.values(), *packed], spec.out.shape), family.reference(spec, {**inputs, **weights}))
    assert family.flops(spec) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "problem", "arrays"),
    [
        (Depthwise(), TAPS, depthwise(TAPS)),
        (Linear(), ROWS, linear(ROWS)),
        (Attention(), TOKENS, (attention(TOKENS), {})),
        (LayerNorm(), NORM, layer_norm(NORM)),
        (Pool(), WINDOWS, (pool(WINDOWS), {})),
        (Mean(), MeanShape(2, 3, 4, 140), ({"x": normal(2, 3, 4, 140)}, {})),
        (Softmax(), SoftmaxShape((300,), 40), ({"x": normal(300, 40)}, {})),
    ],
    ids=lambda value: value.OP if isinstance(value, Generator) else "",
)
def test_tilings(call: Call, here: Isa, family: Generator, problem: Any, arrays: Any) -> None:
    offered = family.tilings_for(problem, here)
    assert len(offered) == len(set(offered)) >= 4
    assert all(isinstance(each, family.TILING) for each in offered)
    assert family.default_for(problem, here, 1) in offered
    for index in np.random.RandomState(0).permutation(len(offered))[:3]:
        agree(*computed(call, family, problem, *arrays, here, 4, offered[index]))
