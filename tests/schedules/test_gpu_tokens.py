"""Attention, products, norms, softmax and pooling of GPUs, run by an OpenCL driver (PoCL) and held against numpy.

All kernels are in one library, which is compiled once. Results start as NaN, so that gaps show.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from saevit_tvm.runtime import opencl
from schedules import activations
from schedules.cpu.generator import Generator
from schedules.cpu.primitives.attention import Attention
from schedules.cpu.primitives.group_norm import GroupNorm
from schedules.cpu.primitives.matmul import Matmul
from schedules.cpu.primitives.norm import LayerNorm
from schedules.cpu.primitives.pool import Mean, Pool
from schedules.cpu.primitives.softmax import Softmax
from schedules.gpu.epilogue import PLANE
from schedules.gpu.launch import Launch
from schedules.gpu.plan import accepts, plan
from schedules.gpu.registry import declare, kernel_of
from schedules.machines.gpus import CUDA_LIMITS, GENERIC, LIMITS, Limits
from schedules.spec import BY_CHANNEL, Epilogue, KernelSpec, Tensor

FAMILIES: dict[str, Generator] = {
    each.OP: each for each in (Attention(), Matmul(), LayerNorm(), GroupNorm(), Softmax(), Pool(), Mean())
}
NORMS, IMAGES = ("layer_norm", "group_norm"), ("pool", "group_norm")
# As other devices have it, for a driver that has no arithmetic in float16.
MALI, ADRENO, NVIDIA = (
    replace(each, half=False, tensor_cores=()) for each in (LIMITS["mali"], LIMITS["adreno"], CUDA_LIMITS["sm_80"])
)
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}  # of the largest result
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A spec for a device, in a type of numbers; with a seed, by one of the other tilings."""

    spec: KernelSpec
    limits: Limits = GENERIC
    dtype: str = "float32"
    seed: int | None = None
    given: str | None = None

    @property
    def launch(self) -> Launch:
        lowered = plan(self.spec, {}, self.limits, self.dtype, self.given)
        assert lowered is not None and accepts(self.spec, self.limits)
        (launch,) = lowered.launches
        return launch

    @property
    def tiling(self) -> dict[str, int] | None:
        if self.seed is None:
            return None
        return asdict(random.Random(self.seed).choice(self.launch.kernel.tilings(self.limits)))

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.spec.x.shape))
        return "-".join([self.spec.op, sizes, *self.spec.epilogue.steps, self.dtype]).replace(" ", "_")


def spec_of(
    op: str, inputs: Mapping[str, tuple[int, ...]], out: tuple[int, ...], steps: str = "", **attrs: Any
) -> KernelSpec:
    """As a pattern writes it. Channels are the last axis, or the second of an image."""
    layout = "NCHW" if op in (*IMAGES, "mean") else ""
    epilogue = Epilogue(tuple(step for step in steps.split(", ") if step))
    result = Tensor("out", out, layout=layout if len(out) == 4 else "")
    tensors = [Tensor(name, shape, layout=layout) for name, shape in inputs.items()]
    shapes = {name: (*out[:2], 1, 1) if name.startswith(PLANE) else out for name in epilogue.operands}
    tensors += [replace(result, name=name, shape=shape) for name, shape in shapes.items()]
    channels = out[1] if op in IMAGES else out[-1]
    weights = [Tensor("g", (channels,))] if op in NORMS else []
    weights += [Tensor("b", (channels,))] if op in NORMS else []  # its own
    named = {**BY_CHANNEL, "bias": "bias" if op in NORMS else "b"}
    weights += [Tensor(name, (channels,)) for step, name in named.items() if step in epilogue.steps]
    return KernelSpec.of(op, tensors, weights, [result], attrs, epilogue.steps)


def attention(
    n: int, t: int, s: int, heads: int, d: int, dv: int, steps: str = "", scale: float = 0.3, mask: Any = ()
) -> KernelSpec:
    inputs = {"q": (n, t, heads, d), "k": (n, s, heads, d), "v": (n, s, heads, dv)} | ({"mask": mask} if mask else {})
    return spec_of("attention", inputs, (n, t, heads, dv), steps, scale=scale)


def rows(op: str, *shape: int, steps: str = "") -> KernelSpec:
    return spec_of(op, {"x": shape}, shape, steps, **({"eps": 1e-3} if op == "layer_norm" else {}))


def product(*lead: int, m: int, c: int, k: int, steps: str = "") -> KernelSpec:
    return spec_of("matmul", {"x": (*lead, m, c), "y": (*lead, c, k)}, (*lead, m, k), steps)


def group_norm(x: tuple[int, ...], groups: int, steps: str = "") -> KernelSpec:
    return spec_of("group_norm", {"x": x}, x, steps, groups=groups, eps=1e-3)


def pool(x: tuple[int, ...], out: tuple[int, ...], mode: str, steps: str = "", **attrs: Any) -> KernelSpec:
    return spec_of("pool", {"x": x}, (*x[:2], *out), steps, mode=mode, **{"kernel": (3, 3), **attrs})


def mean(*x: int, steps: str = "") -> KernelSpec:
    return spec_of("mean", {"x": x}, x[:2], steps)


SAME = {"padding": (1, 1, 1, 1)}
HALVED = {"strides": (2, 2), **SAME}
ODD_ATTENTION = Case(attention(1, 9, 21, 2, 16, 16, mask=(1, 2, 9, 21)))
FEW_ROWS = {"layer_norm": Case(rows("layer_norm", 7, 37)), "softmax": Case(rows("softmax", 7, 37))}
POOLS = {mode: Case(pool((1, 3, 9, 11), (9, 11), mode, **SAME)) for mode in ("max", "avg")}
CASES = [
    ODD_ATTENTION,
    *FEW_ROWS.values(),
    *POOLS.values(),
    Case(attention(1, 37, 37, 3, 16, 16, "bias, gelu"), NVIDIA),
    Case(attention(2, 9, 70, 2, 20, 12, "bias, add residual, relu", mask=(2, 1, 1, 70)), ADRENO, seed=3),
    Case(attention(1, 33, 50, 1, 7, 5, "multiply gate", mask=(1, 1, 33, 1)), MALI, "float16"),
    Case(attention(1, 20, 65, 2, 64, 64), GENERIC, "float16", given="float32"),
    Case(attention(2, 1, 50, 2, 8, 72), MALI, seed=1),
    Case(rows("layer_norm", 2, 25, 48, steps="gelu, add residual"), NVIDIA),
    Case(rows("layer_norm", 3, 421), MALI, "float16"),  # more of a row than registers hold
    Case(rows("layer_norm", 3, 1, steps="multiply gate"), ADRENO, seed=2),
    Case(rows("layer_norm", 3, 12, steps="relu, scale, bias")),
    Case(group_norm((2, 12, 5, 8), 3, "relu, scale, bias, add residual")),
    Case(group_norm((1, 6, 3, 3), 1, "multiply gate"), MALI, "float16"),
    Case(group_norm((2, 8, 31, 29), 8), ADRENO, seed=1),  # one channel each, of no even number
    Case(product(2, 3, m=9, c=21, k=12, steps="bias, gelu")),
    Case(product(5, m=16, c=49, k=16, steps="add residual"), MALI, "float16"),
    Case(product(2, m=33, c=16, k=40, steps="multiply gate, scale"), ADRENO),  # through local memory
    Case(product(1, 3, m=7, c=5, k=3), NVIDIA, "float16", seed=2, given="float32"),
    Case(product(m=1, c=8, k=24, steps="relu"), GENERIC),
    Case(rows("softmax", 2, 25, 48, steps="bias, tanh, multiply gate"), ADRENO),
    Case(rows("softmax", 3, 1605), GENERIC, "float16", given="float32"),
    Case(rows("softmax", 1, 5), NVIDIA, seed=1),
    Case(pool((2, 3, 15, 14), (8, 7), "max", "bias, relu6, add residual", **HALVED), MALI),
    Case(pool((2, 5, 7, 9), (3, 4), "avg", "multiply gate", strides=(2, 2), padding=(0, 0, 1, 1)), GENERIC, "float16"),
    Case(pool((1, 3, 7, 9), (7, 9), "avg", count_padding=True, **SAME), NVIDIA, seed=0),
    Case(pool((1, 2, 13, 9), (5, 9), "max", kernel=(5, 4), dilation=(2, 1), padding=(0, 2, 0, 1)), given="float32"),
    Case(mean(3, 21, 5, 2, steps="bias, silu, scale")),
    Case(pool((2, 3, 9, 11), (9, 11), "max", "multiply plane, scale", **SAME)),
    Case(mean(1, 4, 30, 31, steps="add residual"), ADRENO, "float16"),
]


def values(case: Case) -> Arrays:
    """Inputs and weights by name, as far apart as roundings let them be seen."""
    found = {}
    for seed, each in enumerate([*case.spec.inputs, *case.spec.weights]):
        found[each.name] = np.random.RandomState(seed).standard_normal(each.shape).astype("float32")
    return found


def as_stored(case: Case, arrays: Arrays) -> Arrays:
    """As the kernel reads them, in float32."""
    launch = case.launch
    types = {name: buffer.dtype for name, buffer in launch.buffers}
    return {name: array.astype(types[name]).astype("float32") for name, array in arrays.items()}


def expected(case: Case, arrays: Arrays) -> np.ndarray:
    """By the references of the CPU's generators, which have images channels last, and an epilogue apart."""
    spec, steps = case.spec, case.spec.epilogue
    inputs = tuple(each for each in spec.inputs if each.name not in steps.operands)
    weights = spec.weights[:2] if spec.op in NORMS else ()
    plain = replace(spec, inputs=inputs, weights=weights, epilogue=Epilogue())
    image = bool(spec.x.layout)
    with np.errstate(all="ignore"):
        turned = {**arrays, "x": arrays["x"].transpose(0, 2, 3, 1)} if image else arrays
        out = FAMILIES[spec.op].reference(plain.laid_out("NHWC") if image else plain, turned)
        named = {"b": arrays.get("bias", arrays.get("b")), "s": arrays.get("s")}
        by_channel, out = {name: each for name, each in named.items() if each is not None}, out.astype("float64")
        if spec.op in IMAGES:
            out = out.transpose(0, 3, 1, 2)
            by_channel = {name: each[:, None, None] for name, each in by_channel.items()}
        return activations.reference(steps.steps, out, {**arrays, **by_channel})


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Any]:
    """run(case, arrays): what the first OpenCL device makes of them."""
    import tvm

    from saevit_tvm.backends.opencl import generating_kernels

    if not opencl.available()[0]:
        pytest.skip(opencl.available()[1])
    functions = {
        f"k{i}": case.launch.kernel.generated(case.limits, case.tiling).with_attr("global_symbol", f"k{i}")
        for i, case in enumerate(CASES)
    }
    opencl.activate()
    with generating_kernels(GENERIC):
        library = tvm.compile(
            tvm.IRModule(functions), target=tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm"}})
        )
    library.export_library(str(folder / "tokens.so"))
    module, device = tvm.runtime.load_module(str(folder / "tokens.so")), tvm.runtime.device("opencl", 0)

    def run(case: Case, arrays: Arrays) -> np.ndarray:
        launch = case.launch
        given = [tvm.runtime.tensor(arrays[name].astype(buffer.dtype), device) for name, buffer in launch.buffers]
        buffer = launch.kernel.out
        out = tvm.runtime.tensor(np.full(buffer.extents, np.nan, buffer.dtype), device)
        module[f"k{CASES.index(case)}"](*given, out)
        return out.numpy()

    yield run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_computes_what_numpy_does(case: Case, run: Any) -> None:
    arrays = values(case)
    found, wanted = run(case, arrays), expected(case, as_stored(case, arrays))
    assert found.shape == wanted.shape == case.spec.out.shape and str(found.dtype) == case.launch.kernel.out.dtype
    assert str(found.dtype) == case.dtype or case.spec.op == "matmul"
    atol = TOLERANCE[case.dtype] * max(1.0, np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


# What is not a number, and what is too large ------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_attention_keeps_what_is_not_a_number(name: str, value: float, run: Any) -> None:
    """As PyTorch does: a query, a key or a value that is none makes just the results NaN that depend on it."""
    arrays = values(ODD_ATTENTION)
    arrays[name].reshape(-1)[37] = value
    q, k, v = (torch.from_numpy(arrays[each]).double().transpose(1, 2) for each in "qkv")
    wanted = ((q @ k.transpose(2, 3) * 0.3 + torch.from_numpy(arrays["mask"])).softmax(-1) @ v).transpose(1, 2)
    assert not wanted.isfinite().all() or (name, value) == ("mask", -np.inf)
    np.testing.assert_allclose(run(ODD_ATTENTION, arrays), wanted.numpy(), atol=1e-5)


def test_masked_keys_have_no_share_at_all(run: Any) -> None:
    """In the first tiles, in the last, or in all but the last of a row."""
    arrays = values(ODD_ATTENTION)
    arrays["mask"][:, 0, :4, 5:] = arrays["mask"][:, 0, 4:, :20] = -np.inf
    arrays["v"][:, 5:20, 0] = 1e38
    found = run(ODD_ATTENTION, arrays)
    np.testing.assert_allclose(found, expected(ODD_ATTENTION, arrays), atol=1e-5)


def test_a_query_that_sees_no_key_sees_all_alike(run: Any) -> None:
    """Where a mask has the smallest number and not minus infinity."""
    arrays = values(ODD_ATTENTION)
    arrays["mask"][:] = np.finfo("float32").min
    np.testing.assert_allclose(run(ODD_ATTENTION, arrays), expected(ODD_ATTENTION, arrays), atol=1e-5)


def test_large_scores_are_safe(run: Any) -> None:
    arrays = values(ODD_ATTENTION)
    arrays["q"] *= 100
    np.testing.assert_allclose(run(ODD_ATTENTION, arrays), expected(ODD_ATTENTION, arrays), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("layer_norm", value) for value in (np.nan, np.inf, -np.inf, 200.0)),
        *(("softmax", value) for value in (np.nan, np.inf, -np.inf, 200.0, -200.0, 3e38)),
    ],
)
def test_rows_with_odd_numbers(name: str, value: float, run: Any) -> None:
    """NaN and infinities spoil their row and no other, as in PyTorch; large numbers spoil nothing."""
    case = FEW_ROWS[name]
    for place in (0, 20, 36):
        arrays = values(case)
        arrays["x"][3, place] = value
        x = torch.from_numpy(arrays["x"]).double()
        wanted = x.softmax(-1)
        if name == "layer_norm":
            wanted = F.layer_norm(x, (37,), *(torch.from_numpy(arrays[each]).double() for each in "gb"), 1e-3)
        np.testing.assert_allclose(run(case, arrays), wanted.numpy(), atol=1e-5, rtol=1e-5)


def test_softmax_of_nothing_but_minus_infinity(run: Any) -> None:
    arrays = {"x": np.full((7, 37), -np.inf, "float32")}
    arrays["x"][2] = np.finfo("float32").min
    found = run(FEW_ROWS["softmax"], arrays)
    assert np.isnan(np.delete(found, 2, 0)).all()
    np.testing.assert_allclose(found[2], 1 / 37, rtol=1e-5)


def test_a_row_with_a_large_mean(run: Any) -> None:
    case = FEW_ROWS["layer_norm"]
    arrays = values(case)
    arrays["x"] += 50
    np.testing.assert_allclose(run(case, arrays), expected(case, arrays), atol=1e-4)


@pytest.mark.parametrize("mode", POOLS)
def test_pooling_keeps_nan(mode: str, run: Any) -> None:
    """Wherever in its window it is; and what is nothing but minus infinity."""
    case = POOLS[mode]
    arrays = values(case)
    x = arrays["x"]
    x[0, 0, 4, 4], x[0, 1, 0, 0], x[0, 2] = np.nan, np.inf, -np.inf
    given = torch.from_numpy(x).double()
    wanted = F.max_pool2d(given, 3, 1, 1) if mode == "max" else F.avg_pool2d(given, 3, 1, 1, count_include_pad=False)
    assert wanted.isnan().sum() == 9
    np.testing.assert_allclose(run(case, arrays), wanted.numpy(), atol=1e-5)


# Specs, devices and tilings -------------------------------------------------------------


def test_what_there_are_no_kernels_for_is_declined() -> None:
    norm, heads = rows("layer_norm", 4, 8), attention(2, 9, 21, 2, 20, 12)
    q, k, v = heads.inputs
    for spec in (
        replace(rows("layer_norm", 4, 8, steps="bias"), weights=norm.weights),  # its own offset is another
        replace(norm, weights=(norm.weights[0], Tensor("b", (4,)))),
        rows("softmax", 4, 8, steps="softplus"),
        pool((1, 4, 8, 8), (4, 4), "max", **SAME),  # which is not what comes out
        pool((1, 4, 8, 8), (8, 8), "min", **SAME),
        replace(mean(1, 4, 8, 8), outputs=(Tensor("out", (4,)),)),
        replace(heads, inputs=(q, replace(k, shape=(2, 21, 1, 20)), v)),
        replace(heads, inputs=(q, k, v, Tensor("mask", (2, 2, 9, 20)))),
        replace(heads, inputs=(q, k, v, Tensor("mask", (9, 21)))),
        replace(heads, inputs=(replace(q, strides=(1, 1, 1, 1)), k, v)),
        product(70000, m=1, c=2, k=2),
        replace(group_norm((1, 8, 4, 4), 2), weights=(Tensor("g", (8,)), Tensor("b", (4,)))),
    ):
        assert not accepts(spec, GENERIC) and plan(spec, {}, GENERIC) is None


@pytest.mark.parametrize("name", ["generic-opencl", "mali", "adreno", "sm_75", "sm_90"])
def test_every_device_has_tilings(name: str) -> None:
    """For vision models, and for wider heads than any of them has; the default is the first that fits."""
    limits = (LIMITS | CUDA_LIMITS)[name]
    for spec in (
        attention(1, 197, 197, 12, 64, 64),
        attention(64, 49, 49, 3, 32, 32, mask=(64, 3, 49, 49)),
        attention(1, 1, 1024, 1, 512, 512, "bias, add residual"),
        rows("layer_norm", 1, 197, 768),
        group_norm((1, 96, 56, 56), 1),
        product(8, m=16, c=3136, k=16),
        rows("softmax", 1, 1000),
        pool((1, 64, 112, 112), (56, 56), "max", **HALVED),
        mean(1, 1280, 7, 7),
    ):
        kernel = Case(spec, limits).launch.kernel
        offered = kernel.tilings(limits)
        assert len(offered) >= 4 and offered[0] == kernel.default(limits)
        assert kernel_of(declare(kernel)) == kernel
