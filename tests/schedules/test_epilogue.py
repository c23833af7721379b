"""Every activation, on vectors of a CPU, held against PyTorch; and what is not a number stays so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from tvm import tirx

from schedules import activations
from schedules.activations import ACTIVATIONS
from schedules.cpu.builder import Builder, Expr
from schedules.cpu.epilogue import applied
from schedules.machines.cpus import AVX2, AVX512, NEON, Isa
from schedules.spec import Epilogue

Call = Callable[..., np.ndarray]
PYTORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky:0.01": F.leaky_relu,
    "leaky:0.2": lambda x: F.leaky_relu(x, 0.2),
    "clip:-1.0:1.0": F.hardtanh,
    "clip:-inf:0.5": lambda x: x.clamp(max=0.5),
}
STEPS = [*ACTIVATIONS, "leaky:0.2", "clip:-inf:0.5"]
VALUES = np.concatenate([np.linspace(-12, 12, 1000), [0.0, -0.0, -90, 90, -1e4, 1e4]]).astype("float32")


def expected(name: str, values: np.ndarray) -> np.ndarray:
    function = PYTORCH.get(name) or getattr(F, name)
    return function(torch.from_numpy(values).double()).numpy()


def kernel(isa: Isa, epilogue: Epilogue, size: int) -> tirx.PrimFunc:
    """out = epilogue(x), with another tensor beside it for every operand."""
    b = Builder(isa.dtype, isa.stored)
    x = b.param("x", (size,))
    others = {name: b.param(name, (size,)) for name in ("b", *epilogue.operands)}
    out = b.param("out", (size,))
    with b.loop("i", size // isa.lanes) as i:

        def operand(name: str, lanes: int) -> Expr:
            return b.load(others[name], i * isa.lanes, lanes)

        b.store(out, i * isa.lanes, applied(b, epilogue, b.load(x, i * isa.lanes, isa.lanes), operand))
    return b.function("epilogue")


def result(call: Call, isa: Isa, steps: tuple[str, ...], x: np.ndarray, **others: np.ndarray) -> np.ndarray:
    whole = -(-len(x) // isa.lanes) * isa.lanes
    padded = [np.resize(each, whole).astype(isa.stored) for each in (x, others.pop("b", x), *others.values())]
    return call(kernel(isa, Epilogue(steps), whole), padded, (whole,))[: len(x)]


@pytest.mark.slow
@pytest.mark.parametrize("isa", [AVX512, AVX2, NEON, NEON.storing("float16")], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_an_activation_is_pytorchs(call: Call, name: str, isa: Isa) -> None:
    half = isa.stored == "float16"
    values = VALUES.astype(isa.stored)
    wanted = expected(name, values.astype("float32"))
    found = result(call, isa, (name,), values).astype("float64")
    error = np.abs(found - wanted) / np.maximum(1, np.abs(wanted))
    assert error.max() < (4e-3 if half else 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [AVX512, NEON], ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", sorted({*STEPS} - {"gelu"}))
def test_what_is_not_a_number_stays_so(call: Call, name: str, isa: Isa) -> None:
    """A broken camera must not look like an answer."""
    values = np.array([np.nan, 1, np.inf, -np.inf, -1], "float32").repeat(16)
    with np.errstate(invalid="ignore"):
        wanted = expected(name, values)
    np.testing.assert_array_equal(np.isnan(result(call, isa, (name,), values)), np.isnan(wanted))


def test_the_step_of_an_activation_has_its_numbers() -> None:
    row = ACTIVATIONS["leaky:0.1"]
    assert row.numbers == (0.1,) and row.step == "leaky:0.1"
    assert replace(row, numbers=(float(np.float32(0.1)),)).step == "leaky:0.1"  # as ONNX has it
    assert not any(step in ACTIVATIONS for step in ("leaky", "leaky:x", "leaky:1:2", "relu:1", "softplus"))


def test_steps_are_done_in_their_order(call: Call) -> None:
    random = np.random.RandomState(0)
    x, b, residual, gate = random.standard_normal((4, 64)).astype("float32")
    for steps in [
        ("bias", "add residual", "relu"),
        ("bias", "relu", "add residual"),
        ("bias", "silu", "multiply gate", "add residual"),
        ("multiply gate", "bias"),
    ]:
        named = {"residual": residual, "gate": gate}
        others = {name: named[name] for name in Epilogue(steps).operands}
        wanted = activations.reference(steps, x.astype("float64"), {"b": b, **others})
        np.testing.assert_allclose(result(call, AVX2, steps, x, b=b, **others), wanted, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_tvm_does_not_write_it_out_again_and_again(name: str) -> None:
    """What its simplifier puts in place of every name, it and LLVM take long to read."""
    written = tvm.IRModule({"main": kernel(AVX2, Epilogue((name,)), 8 * AVX2.lanes)})
    assert len(tirx.transform.StmtSimplify()(written).script()) < 1.5 * len(written.script())
