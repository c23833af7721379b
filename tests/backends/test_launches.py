"""What a device would refuse is found by the compiler, in our kernels and in those that a rule scheduled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm
from tvm import relax, tirx
from tvm.relax import transform
from tvm.s_tir import dlight

from saevit_tvm.backends.launches import check_launches, read
from saevit_tvm.support.errors import CompileError
from schedules.gpu.fallback import fallback_rules
from schedules.gpu.primitives.conv import Conv
from schedules.machines.gpus import GENERIC, LIMITS, Limits


@pytest.fixture(scope="module")
def ours() -> tvm.IRModule:
    """A convolution as for an Adreno without images: 128 work-items, 2 KB of local memory, some 90 registers."""
    kernel = Conv(1, 16, 16, 16, 64).generated(replace(LIMITS["adreno"], texels=0))
    return tvm.IRModule({"project": kernel.with_attr("global_symbol", "project")})


@pytest.fixture(scope="module")
def by_rule() -> tvm.IRModule:
    """A sum over rows, whose work-items meet in local memory."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((8, 4096), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.sum(x, axis=[1])))
    target = tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm"}})
    with target:
        mod = transform.LegalizeOps()(builder.get())
        return dlight.ApplyDefaultSchedule(*fallback_rules())(mod)


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        (Limits(64, 32768, registers_per_item=128), "128 work-items in a work-group, of 64"),
        (Limits(256, 1024, registers_per_item=128), "bytes of local memory, of 1024"),
        (Limits(256, 32768, registers_per_item=32), "registers a work-item, of 32"),
        (Limits(256, 32768, registers_per_item=128, registers=4096), "registers a work-group, of 4096"),
    ],
)
def test_a_kernel_beyond_the_limits_is_an_error(ours: tvm.IRModule, limits: Limits, wanted: str) -> None:
    with pytest.raises(CompileError) as raised:
        check_launches(ours, limits, "a small device")
    assert "the kernel 'project' cannot run on a small device" in str(raised.value) and wanted in str(raised.value)


def test_what_fits_passes(ours: tvm.IRModule) -> None:
    check_launches(ours, LIMITS["adreno"], "adreno")


def test_kernels_of_rules_are_counted_too(by_rule: tvm.IRModule) -> None:
    assert any(isinstance(func, tirx.PrimFunc) for func in by_rule.functions.values())
    check_launches(by_rule, GENERIC, "any device")
    with pytest.raises(CompileError, match="work-items in a work-group, of 16"):
        check_launches(by_rule, Limits(16, 16384), "a small device")
    with pytest.raises(CompileError, match="bytes of local memory, of 16"):
        check_launches(by_rule, Limits(256, 16), "a small device")


def test_what_a_condition_excludes_is_not_counted() -> None:
    """Of 64 work-items 48 store once, 12 of these once more, and all of them behind that."""
    source = """
@T.prim_func(s_tir=True)
def some(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
    for block in T.thread_binding(1, thread="blockIdx.x"):
        for i in T.thread_binding(64, thread="threadIdx.x"):
            if i < 48:
                y[i] = x[i]
                if i < 12:
                    y[i] = x[i]
            y[i] = x[i]
"""
    (row,) = read(tvm.script.from_source(source, extra_vars={"T": tvm.script.tirx}))
    assert row["bytes_stored"] == row["bytes_loaded"] == 4 * (48 + 12 + 64)
