"""Convolutions and linear layers on tensor cores, where there are none.

The CUDA sources are compiled for this CPU and run there, block by block, with products of matrices emulated
(saevit_tvm/emulators/cuda_driver): all of a kernel but what tensor cores do. NVIDIA's compiler then makes the real
thing, and its instructions are counted.
"""

from __future__ import annotations

import ctypes
import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  gives NumPy its bfloat16
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from saevit_tvm.backends import nvrtc
from saevit_tvm.emulators import cuda as emulated
from schedules.activations import ACTIVATIONS, reference
from schedules.dtypes import stored_as
from schedules.gpu.epilogue import BIAS_GELU, BIAS_RESIDUAL
from schedules.gpu.primitives.conv import Conv, Convolution
from schedules.gpu.primitives.fragments import ARITHMETICS
from schedules.gpu.primitives.linear import Layer
from schedules.gpu.primitives.tensor import Tiling
from schedules.gpu.primitives.tensor_conv import TensorConv, convolution
from schedules.gpu.primitives.tensor_linear import TensorLinear, linear
from schedules.gpu.registry import declare, kernel_of
from schedules.machines.gpus import CUDA_LIMITS, LIMITS
from schedules.spec import Epilogue

LIMITS_90 = CUDA_LIMITS["sm_90"]
# Of the largest result, or of one: half a unit in the last place of what is stored, and sums in another order.
ROUNDING = {"float16": 6e-4, "bfloat16": 4.5e-3, "tf32": 4e-6}
HALF = {"dtype": "float16", "given": "float16"}
SAME = {dtype: {"dtype": dtype, "given": stored_as(dtype)} for dtype in ARITHMETICS}
RELU_LAST = Epilogue(("bias", "add residual", "relu"))
emulation = pytest.mark.skipif(emulated.missing() is not None, reason=emulated.missing() or "")
needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")


THREE_BY_THREE = {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)}


def cases(dtype: str) -> list[tuple[TensorConv, Tiling | None]]:
    same, common = SAME[dtype], {"rank_one": True, "common": True}
    residual = {"epilogue": BIAS_RESIDUAL}
    return [
        (TensorConv(2, 7, 7, 48, 40, rank_one=True, **residual, **same), None),  # 49 positions: no two lie together
        (TensorConv(3, 5, 4, 33, 17, epilogue=BIAS_GELU, **same), None),  # nothing is a multiple of 16
        (TensorConv(1, 4, 4, 320, 96, **residual, **same), Tiling(3, 1, 2, 1, 64)),
        (TensorConv(17, 4, 2, 24, 100, rank_one=True, **same), Tiling(4, 2, 1, 4, 16)),
        (TensorConv(2, 9, 8, 3, 24, epilogue=BIAS_GELU, dtype=dtype, given="float32", **THREE_BY_THREE), None),
        (TensorConv(3, 7, 7, 20, 32, **THREE_BY_THREE, **same), Tiling(2, 2, 1, 2, 32)),
        (TensorConv(2, 8, 8, 32, 18, strides=(2, 2), **same), None),
        (TensorConv(1, 7, 7, 200, 48, **common, **residual, **same), None),  # some share columns
        (TensorConv(3, 7, 6, 96, 20, **common, **same), Tiling(1, 4, 1, 4, 32)),  # some have several
        (TensorConv(2, 6, 9, 20, 24, (3, 1), (1, 2), (0, 1, 2, 0), (2, 1), RELU_LAST, **same), None),
        (TensorConv(1, 8, 8, 32, 16, epilogue=Epilogue(("tanh", "silu", "multiply gate")), **same), None),
    ]


def linears(dtype: str) -> list[tuple[TensorLinear, Tiling | None]]:
    same, own = SAME[dtype], {"own": True}
    return [
        (TensorLinear((2, 25), 48, 40, epilogue=BIAS_GELU, **same), None),
        (TensorLinear((197,), 33, 17, epilogue=BIAS_RESIDUAL, **same), None),  # nothing is a multiple of 16
        (TensorLinear((1, 49), 200, 96, epilogue=Epilogue(("tanh", "scale", "multiply gate")), **same), None),
        (TensorLinear((70,), 20, 100, dtype=dtype, given="float32"), Tiling(3, 1, 2, 1, 64)),
        (TensorLinear((2, 3, 20), 24, 36, epilogue=Epilogue(("add residual", "relu")), **own, **same), None),
        (TensorLinear((5, 18), 49, 32, epilogue=Epilogue(), **own, **same), Tiling(2, 2, 1, 2, 16)),
    ]


def inputs(kernel: Convolution | Layer) -> list[np.ndarray]:
    """Numbers of a size that keeps sums near one, as the kernel stores them; short enough for its arithmetic."""
    stream, short = np.random.RandomState(0), "bfloat16" if kernel.dtype == "bfloat16" else "float16"
    found = []
    for name, buffer in kernel.reads.items():
        size = (kernel.c * getattr(kernel, "taps", 1)) ** -0.5 if name in ("w", "dec_w") else 1.0
        found.append((stream.standard_normal(buffer.extents) * size).astype(short).astype(buffer.dtype))
    return found


def expected(kernel: Convolution | Layer, values: list[np.ndarray]) -> np.ndarray:
    exact = (torch.from_numpy(value.astype("float64")) for value in values)
    given = dict(zip(kernel.reads, exact, strict=True))
    if isinstance(kernel, Layer):
        named = {"s" if name == "factor" else name: value.numpy() for name, value in given.items()}
        return reference(kernel.epilogue.steps, (given["x"] @ given["w"]).numpy(), named)
    weight = given["w"].reshape(*kernel.kernel, kernel.c, kernel.k).permute(3, 2, 0, 1)
    above, left, below, right = kernel.padding
    padded = F.pad(given["x"], (left, right, above, below))
    out = F.conv2d(padded, weight, None, kernel.strides, 0, kernel.dilation)
    if kernel.common:
        common = F.gelu((given["x"] * given["dec_w"][:, None, None]).sum(1, keepdim=True) + given["dec_b"])
    if kernel.rank_one:
        by_position = common if kernel.common else given["by_position"]
        out = out - by_position * given["by_channel"][:, None, None]
    operands = {name: value[:, None, None] if name == "b" else value for name, value in given.items()}
    return reference(kernel.epilogue.steps, out.numpy(), {name: value.numpy() for name, value in operands.items()})


def source_of(kernels: Sequence[tuple[Convolution | Layer, Tiling | None]], sm: str = "sm_90") -> str:
    """Kernels with their tilings as CUDA C++, named k0, k1 ..."""
    import tvm

    limits, functions = CUDA_LIMITS[sm], {}
    for i, (kernel, tiling) in enumerate(kernels):
        chosen = dataclasses.asdict(tiling or kernel.default(LIMITS_90))
        functions[f"k{i}"] = kernel.generated(limits, chosen).with_attr("global_symbol", f"k{i}")
    target = tvm.target.Target({"kind": "cuda", "arch": sm, "host": {"kind": "llvm"}})
    return str(tvm.compile(tvm.IRModule(functions), target=target).mod.imports[0].inspect_source())


class Kernels:
    """CUDA kernels on this CPU."""

    def __init__(self, source: str, folder: Path) -> None:
        path = emulated.kernels(source, folder / f"{len(list(folder.iterdir()))}.so")
        self._library = ctypes.CDLL(str(path))
        self._parameters = {
            name: re.findall(r"(\w+)_ptr\b", told)
            for name, told in re.findall(r"__global__ void __launch_bounds__\(\d+\) (\w+)_kernel\((.*)\);", source)
        }

    def run(
        self, name: str, kernel: Convolution | Layer, tiling: Tiling | None, values: list[np.ndarray]
    ) -> np.ndarray:
        """The result starts as NaN, so that gaps show; and what is behind a buffer is NaN, if somebody reads it."""
        program = kernel.program(LIMITS_90, tiling or kernel.default(LIMITS_90))
        out = np.full(kernel.out.extents, np.nan, kernel.out.dtype)
        fenced = (np.append(value, np.full(1024, np.nan, value.dtype)) for value in values)
        buffers = {**dict(zip(kernel.reads, fenced, strict=True)), "out": out}
        places = [ctypes.c_void_p(buffers[each].ctypes.data) for each in self._parameters[name]]
        arguments = (ctypes.c_void_p * len(places))(*(ctypes.addressof(place) for place in places))
        sizes = ((ctypes.c_uint * 3)(*(*each, 1, 1, 1)[:3]) for each in (program.grid, program.group))
        getattr(self._library, f"run_{name}_kernel")(*sizes, arguments)
        return out


def agree(kernels: Sequence[tuple[TensorConv | TensorLinear, Tiling | None]], folder: Path) -> None:
    """All in one library."""
    library = Kernels(source_of(kernels), folder)
    for i, (kernel, tiling) in enumerate(kernels):
        values = inputs(kernel)
        out, wanted = library.run(f"k{i}", kernel, tiling, values), expected(kernel, values)
        error = np.abs(out.astype("float64") - wanted).max() / max(1.0, np.abs(wanted).max())
        assert error < ROUNDING[kernel.dtype], (kernel, tiling, error)


# Arithmetic -----------------------------------------------------------------------


@pytest.mark.slow
@emulation
@pytest.mark.parametrize("dtype", ARITHMETICS)
def test_convolutions(dtype: str, tmp_path: Path) -> None:
    agree(cases(dtype), tmp_path)


@pytest.mark.slow
@emulation
@pytest.mark.parametrize("dtype", ARITHMETICS)
def test_linear_layers(dtype: str, tmp_path: Path) -> None:
    agree(linears(dtype), tmp_path)


@pytest.mark.slow
@emulation
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 2e-6), ("float16", 4e-3), ("bfloat16", 4.5e-3)])
def test_a_plain_convolution_sums_the_common_part_up_too(dtype: str, allowed: float, tmp_path: Path) -> None:
    shape = {"rank_one": True, "common": True, "dtype": dtype, "given": dtype}
    kernels = [Conv(2, 7, 7, 40, 32, epilogue=BIAS_RESIDUAL, **shape), Conv(1, 4, 8, 24, 12, **shape)]
    library = Kernels(source_of([(kernel, None) for kernel in kernels]), tmp_path)
    for name, kernel in zip(("k0", "k1"), kernels, strict=True):
        values = inputs(kernel)
        out, wanted = library.run(name, kernel, None, values), expected(kernel, values)
        assert np.abs(out.astype("float64") - wanted).max() < allowed * np.abs(wanted).max()


@st.composite
def any_kernel(draw: st.DrawFn) -> tuple[TensorConv, Tiling]:
    size = st.integers(1, 9)
    kernel, strides, sides = draw(st.sampled_from([(1, 1, 0), (1, 1, 0), (3, 2, 1), (3, 1, 1), (2, 2, 0)]))
    dtype, rank_one = draw(st.sampled_from(sorted(ARITHMETICS))), draw(st.booleans())
    steps = st.sampled_from(["bias", "add residual", "multiply gate", *ACTIVATIONS])
    found = TensorConv(
        n=draw(st.integers(1, 5)),
        h=max(kernel, draw(size)),
        w=max(kernel, draw(size)),
        c=draw(st.integers(1, 70)),
        k=draw(st.integers(1, 70)),
        kernel=(kernel, kernel),
        strides=(strides, strides),
        padding=(sides,) * 4,
        epilogue=Epilogue(tuple(draw(st.lists(steps, max_size=3, unique=True)))),
        rank_one=rank_one,
        common=rank_one and kernel == 1 and draw(st.booleans()),
        dtype=dtype,
        given=draw(st.sampled_from([stored_as(dtype), stored_as(dtype), "float32"])),
    )
    chance = random.Random(draw(st.integers(0, 1 << 30)))
    return found, chance.choice(found.tilings(LIMITS_90))


@pytest.mark.slow
@emulation
@settings(max_examples=2, deadline=None)
@given(kernels=st.lists(any_kernel(), min_size=4, max_size=4))
def test_any_convolution(kernels: list[tuple[TensorConv, Tiling]], tmp_path_factory: pytest.TempPathFactory) -> None:
    agree(kernels, tmp_path_factory.mktemp("kernels"))


@pytest.mark.slow
@emulation
def test_tf32_is_rounded_and_not_cut_off(tmp_path: Path) -> None:
    """Cut off, numbers of one sign would all become smaller, by 2**-11 on average, and so would their sums."""
    kernel = TensorConv(1, 4, 4, 64, 16, **SAME["tf32"])
    values = [np.random.RandomState(1).uniform(1, 2, buffer.extents).astype("f") for buffer in kernel.reads.values()]
    out = Kernels(source_of([(kernel, None)]), tmp_path).run("k0", kernel, None, values)
    error = (out - expected(kernel, values)) / out
    assert 1e-7 < np.abs(error).max() < 3e-4 and abs(error.mean()) < 3e-5


# What is chosen -------------------------------------------------------------------


@given(
    n=st.sampled_from([1, 3, 8, 17, 64, 256]),
    size=st.integers(1, 113),
    c=st.integers(1, 1600),
    k=st.integers(1, 1600),
    taps=st.sampled_from([1, 3]),
)
@settings(max_examples=60, deadline=None)
def test_no_shape_is_unschedulable(n: int, size: int, c: int, k: int, taps: int) -> None:
    shape = {"n": n, "h": size, "w": size, "c": c, "k": k, "kernel": (taps, taps), "padding": (taps // 2,) * 4}
    for same in SAME.values():
        kernel = convolution(LIMITS_90, **shape, **same)
        assert kernel.default(LIMITS_90) is not None
        assert isinstance(kernel, TensorConv) == TensorConv(**shape, **same).pays(LIMITS_90)


def test_tensor_cores_are_used_where_they_are_and_pay() -> None:
    wide = {"n": 64, "h": 14, "w": 14, "c": 192, "k": 768}
    for dtype, same in SAME.items():
        assert isinstance(convolution(LIMITS_90, **wide, **same), TensorConv)
        old = convolution(CUDA_LIMITS["sm_75"], **wide, **same)
        assert isinstance(old, TensorConv) == (dtype == "float16") and old.out.dtype == stored_as(dtype)
    assert isinstance(convolution(LIMITS_90, **wide), Conv)  # float32
    for limits in LIMITS.values():
        assert isinstance(convolution(limits, **wide, **HALF), Conv)
    few = wide | {"n": 1, "h": 2, "w": 2}  # four columns, of the sixteen that would be computed
    assert isinstance(convolution(LIMITS_90, **few, **HALF), Conv)
    assert isinstance(convolution(LIMITS_90, **few | {"n": 2}, **HALF), TensorConv)


def test_linear_layers_use_them_likewise() -> None:
    for dtype, same in SAME.items():
        layer, head = ({"tokens": tokens, "c": 192, "k": 768, **same} for tokens in ((1, 197), (1,)))
        new, old = (linear(CUDA_LIMITS[sm], **layer) for sm in ("sm_90", "sm_75"))
        assert isinstance(new, TensorLinear)
        assert isinstance(old, TensorLinear) == (dtype == "float16") and old.out == new.out
        one = linear(LIMITS_90, **head)  # token, of the sixteen that would be computed
        assert not isinstance(one, TensorLinear) and one.dtype == stored_as(dtype)


def test_few_columns_are_shared_by_more_work_groups() -> None:
    """A work-group of many is large; at batch 1 they are small, so that there are more of them."""
    many, one = (TensorConv(n, 14, 14, 768, 192, **HALF).default(LIMITS_90) for n in (64, 1))
    assert many.tall * many.broad > 2 * one.tall * one.broad


@pytest.mark.parametrize(
    "kernel",
    [cases("bfloat16")[0][0], cases("tf32")[4][0], linears("float16")[0][0]],
    ids=["pointwise", "taps", "linear"],
)
def test_every_tiling_offered_fits_the_gpu(kernel: TensorConv | TensorLinear) -> None:
    """And what a program is said to use is what its loops use."""
    from saevit_tvm.backends.launches import read, usage

    offered = kernel.tilings(LIMITS_90)
    assert len(offered) > 20 and offered[0] == kernel.default(LIMITS_90)
    for chosen in random.Random(0).sample(offered, 3):
        func = kernel.generated(LIMITS_90, dataclasses.asdict(chosen))
        (counted,) = (usage(row) for row in read(func) if usage(row)[0] > 1)
        assert counted == kernel.program(LIMITS_90, chosen).usage


def test_a_declaration_says_what_it_declares() -> None:
    for dtype in ARITHMETICS:
        for kernel, _ in [*cases(dtype), *linears(dtype)]:
            assert kernel_of(declare(kernel)) == kernel


# The real thing -------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", ARITHMETICS)
def test_nvidias_compiler_makes_tensor_instructions(dtype: str) -> None:
    """For the oldest architecture that can and the newest, and nothing is spilled."""
    from saevit_tvm.backends.device_code import compile_kernels

    oldest = "sm_75" if dtype == "float16" else "sm_80"
    wide = TensorConv(64, 14, 14, 192, 768, epilogue=BIAS_GELU, **SAME[dtype])
    # By itself the compiler spills a few numbers of this one in float16, for a fifth block on a multiprocessor.
    deep = TensorConv(64, 7, 7, 1280, 320, epilogue=BIAS_RESIDUAL, rank_one=True, **SAME[dtype])
    layer = TensorLinear((64, 197), 192, 768, epilogue=BIAS_GELU, **SAME[dtype])
    source = source_of([(wide, None), (deep, None), (layer, None), cases(dtype)[0], cases(dtype)[4]], oldest)
    kernels = compile_kernels(source, (oldest, "sm_90", "sm_100")).report["kernels"]
    assert len(kernels) == 5
    assert all(each["tensor_products"] > 0 == each["spill_bytes"] == each["stack_bytes"] for each in kernels.values())
