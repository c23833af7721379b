"""Convolutions on tensor cores, where there are none.

What tensor cores compute of a fragment is NVIDIA's and not run here. All else of a kernel (what is staged where, edges,
barriers, which fragments are multiplied, what becomes of the sums) is the same text when fragments are written out as
loops, and that is run by an OpenCL driver (PoCL) and compared. NVIDIA's compiler then makes the real thing.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from saevit_tvm.runtime import opencl
from saevit_tvm.targets import nvrtc
from schedules.gpu.conv import Conv
from schedules.gpu.declare import declare, kernel_of
from schedules.gpu.devices import CUDA_LIMITS, LIMITS, written_out
from schedules.gpu.tensor import BARRIER, TensorConv, Tiling, convolution

LIMITS_90 = CUDA_LIMITS["sm_90"]
OPENCL = {"kind": "opencl", "host": {"kind": "llvm"}}
ROUNDING = 6e-4  # of the largest result: half a unit in the last place of float16, and sums in another order
HALF = {"dtype": "float16", "given": "float16"}
on_a_device = pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])
needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")

POINTWISE = (
    (TensorConv(2, 7, 7, 48, 40, rank_one=True, residual=True, **HALF), None),  # 49 positions: no two lie together
    (TensorConv(3, 5, 4, 33, 17, activation="gelu", **HALF), None),  # nothing is a multiple of 16
    (TensorConv(1, 4, 4, 320, 96, residual=True, **HALF), Tiling(3, 1, 2, 1, 64)),
    (TensorConv(17, 4, 2, 24, 100, rank_one=True, **HALF), Tiling(4, 2, 1, 4, 16)),
)
WITH_TAPS = (
    (TensorConv(2, 9, 8, 3, 24, 3, 2, 1, "gelu", dtype="float16", given="float32"), None),
    (TensorConv(3, 7, 7, 20, 32, 3, 2, 1, residual=False, **HALF), Tiling(2, 2, 1, 2, 32)),
    (TensorConv(2, 8, 8, 32, 18, 1, 2, 0, **HALF), None),
)


def inputs(kernel: TensorConv) -> list[np.ndarray]:
    """Numbers of a size that keeps sums near one, as the kernel stores them."""
    stream = np.random.RandomState(0)
    found = []
    for name, buffer in kernel.reads.items():
        size = kernel.depth**-0.5 if name == "w" else 1.0
        found.append((stream.standard_normal(buffer.extents) * size).astype(buffer.dtype))
    return found


def expected(kernel: TensorConv, values: list[np.ndarray]) -> np.ndarray:
    given = {name: torch.from_numpy(value).double() for name, value in zip(kernel.reads, values, strict=True)}
    weight = given["w"].reshape(kernel.kernel, kernel.kernel, kernel.c, kernel.k).permute(3, 2, 0, 1)
    out = F.conv2d(given["x"], weight, given["b"], kernel.stride, kernel.padding)
    if kernel.rank_one:
        out = out - given["by_position"] * given["by_channel"][:, None, None]
    out = F.gelu(out) if kernel.activation else out
    return (out + given["residual"] if kernel.residual else out).numpy()


def agree(cases: Any, folder: Path) -> None:
    """Run kernels with their tilings, all in one library; results start as NaN, so that gaps show."""
    import tvm

    from saevit_tvm.compiler.opencl import generating_kernels

    loops = written_out(LIMITS_90)
    functions = {}
    for i, (kernel, tiling) in enumerate(cases):
        chosen = dataclasses.asdict(tiling or kernel.default(LIMITS_90))
        functions[f"k{i}"] = kernel.generated(loops, chosen).with_attr("global_symbol", f"k{i}")
    path = folder / f"{len(list(folder.iterdir()))}.so"
    with generating_kernels(loops):
        tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(OPENCL)).export_library(str(path))
    opencl.activate()
    device, module = tvm.runtime.device("opencl", 0), tvm.runtime.load_module(str(path))
    for i, (kernel, tiling) in enumerate(cases):
        values = inputs(kernel)
        out = tvm.runtime.tensor(np.full(kernel.out.extents, np.nan, "float16"), device)
        module[f"k{i}"](*(tvm.runtime.tensor(value, device) for value in values), out)
        wanted = expected(kernel, values)
        error = np.abs(out.numpy().astype("float64") - wanted).max() / np.abs(wanted).max()
        assert error < ROUNDING, (kernel, tiling, error)


# Arithmetic -----------------------------------------------------------------------


@on_a_device
def test_pointwise_convolutions(folder: Path) -> None:
    agree(POINTWISE, folder)


@on_a_device
def test_convolutions_with_taps(folder: Path) -> None:
    agree(WITH_TAPS, folder)


@st.composite
def any_kernel(draw: st.DrawFn) -> tuple[TensorConv, Tiling]:
    size = st.integers(1, 9)
    kernel, stride, padding = draw(st.sampled_from([(1, 1, 0), (1, 1, 0), (3, 2, 1), (3, 1, 1), (2, 2, 0)]))
    found = TensorConv(
        n=draw(st.integers(1, 5)),
        h=max(kernel, draw(size)),
        w=max(kernel, draw(size)),
        c=draw(st.integers(1, 70)),
        k=draw(st.integers(1, 70)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        activation=draw(st.sampled_from([None, "gelu"])),
        residual=draw(st.booleans()),
        rank_one=draw(st.booleans()),
        dtype="float16",
        given=draw(st.sampled_from(["float16", "float16", "float32"])),
    )
    chance = random.Random(draw(st.integers(0, 1 << 30)))
    return found, chance.choice(found.offered(LIMITS_90))


@on_a_device
@settings(max_examples=2, deadline=None)
@given(cases=st.lists(any_kernel(), min_size=2, max_size=2))
def test_any_convolution(cases: list[tuple[TensorConv, Tiling]], folder: Path) -> None:
    agree(cases, folder)


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
    shape = {"n": n, "h": size, "w": size, "c": c, "k": k, "kernel": taps, "padding": taps // 2}
    for limits in (LIMITS_90, written_out(LIMITS_90)):
        kernel = convolution(limits, **shape, **HALF)
        chosen = kernel.default(limits)
        assert chosen is not None and isinstance(kernel, TensorConv) == TensorConv(**shape, **HALF).pays(limits)
        assert chosen == kernel.default(LIMITS_90)


def test_tensor_cores_are_used_where_they_are_and_pay() -> None:
    wide = {"n": 64, "h": 14, "w": 14, "c": 192, "k": 768}
    assert isinstance(convolution(LIMITS_90, **wide, **HALF), TensorConv)
    assert isinstance(convolution(LIMITS_90, **wide), Conv)  # float32
    for limits in LIMITS.values():
        assert isinstance(convolution(limits, **wide, **HALF), Conv)
    few = wide | {"n": 1, "h": 2, "w": 2}  # four columns, of the sixteen that would be computed
    assert isinstance(convolution(LIMITS_90, **few, **HALF), Conv)
    assert isinstance(convolution(LIMITS_90, **few | {"n": 2}, **HALF), TensorConv)


def test_few_columns_are_shared_by_more_work_groups() -> None:
    """A work-group of many is large; at batch 1 they are small, so that there are more of them."""
    many, one = (TensorConv(n, 14, 14, 768, 192, **HALF).default(LIMITS_90) for n in (64, 1))
    assert many.tall * many.broad > 2 * one.tall * one.broad


@pytest.mark.parametrize("kernel", [POINTWISE[0][0], WITH_TAPS[0][0]], ids=["pointwise", "taps"])
def test_every_tiling_offered_fits_the_gpu(kernel: TensorConv) -> None:
    """And what a program is said to use is what its loops use."""
    from saevit_tvm.compiler.launches import read, usage

    offered = kernel.tilings(LIMITS_90)
    assert len(offered) > 20 and offered[0] == kernel.default(LIMITS_90)
    for chosen in random.Random(0).sample(offered, 3):
        func = kernel.generated(LIMITS_90, dataclasses.asdict(chosen))
        (counted,) = (usage(row) for row in read(func) if usage(row)[0] > 1)
        assert counted == kernel.program(LIMITS_90, chosen).usage


def test_a_declaration_says_what_it_declares() -> None:
    for kernel, _ in (*POINTWISE, *WITH_TAPS):
        assert kernel_of(declare(kernel)) == kernel


# The real thing -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> tuple[str, str]:
    """The same two kernels in CUDA, and in OpenCL with loops for fragments."""
    import tvm

    found = []
    for target, limits in (
        ({"kind": "cuda", "arch": "sm_75", "host": {"kind": "llvm"}}, CUDA_LIMITS["sm_75"]),
        (OPENCL, written_out(CUDA_LIMITS["sm_75"])),
    ):
        functions = {}
        for i, (kernel, _) in enumerate((POINTWISE[0], WITH_TAPS[0])):
            chosen = dataclasses.asdict(kernel.default(LIMITS_90))
            functions[f"k{i}"] = kernel.generated(limits, chosen).with_attr("global_symbol", f"k{i}")
        made = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target))
        found.append(str(made.mod.imports[0].inspect_source()))
    return found[0], found[1]


def test_barriers_are_where_the_kernel_says(sources: tuple[str, str]) -> None:
    """Neither language gets one more: what was run has the barriers of what is shipped."""
    cuda, loops = sources
    said = sum(
        kernel.program(LIMITS_90, kernel.default(LIMITS_90)).body.count(BARRIER)
        for kernel, _ in (POINTWISE[0], WITH_TAPS[0])
    )
    assert cuda.count("__syncthreads();") == loops.count("barrier(CLK_LOCAL_MEM_FENCE);") >= said


@needs_compiler
def test_nvidias_compiler_makes_tensor_instructions(sources: tuple[str, str]) -> None:
    """For the oldest architecture and the newest, and nothing is spilled."""
    from saevit_tvm.compiler.device_code import compile_kernels

    kernels = compile_kernels(sources[0], ("sm_75", "sm_100")).report["kernels"]
    assert len(kernels) == 2
    assert all(each["tensor_products"] > 0 == each["spill_bytes"] == each["stack_bytes"] for each in kernels.values())
