"""What is lowered in a way of its own, held against PyTorch on a CPU and under OpenCL: what is no number stays none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor
from tvm import relax

from saevit_tvm.backends.opencl import generating_kernels
from saevit_tvm.compiler.legalize import OPERATORS
from saevit_tvm.compiler.passes import BindTheRest
from saevit_tvm.runtime import opencl
from schedules.machines.gpus import GENERIC

Case = tuple[Callable[[relax.Var], relax.Expr], Callable[[Tensor], Tensor]]
OTHER = np.array([0.5, -1.0, np.nan, 2.0, -np.inf], "float32")
CASES: dict[str, Case] = {
    "relu": (relax.op.nn.relu, F.relu),
    "clip": (lambda x: relax.op.clip(x, -1.0, 2.0), lambda x: x.clamp(-1.0, 2.0)),
    "maximum": (
        lambda x: relax.op.maximum(x, relax.const(OTHER)),
        lambda x: torch.maximum(x, torch.from_numpy(OTHER)),
    ),
    "minimum": (
        lambda x: relax.op.minimum(relax.const(OTHER[:, None, None]), x),
        lambda x: torch.minimum(torch.from_numpy(OTHER[:, None, None]), x),
    ),
    "max": (lambda x: relax.op.max(x, [1, 3]), lambda x: x.amax((1, 3))),
    "max of all": (relax.op.max, lambda x: x.amax()),
    "max of infinity": (lambda x: relax.op.max(x, -1), lambda x: x.amax(-1)),
    "argmax": (lambda x: relax.op.argmax(x, 1), lambda x: x.argmax(1)),
    "argmax of all": (relax.op.argmax, lambda x: x.argmax()),
    "argmin": (lambda x: relax.op.argmin(x, -1, keepdims=True), lambda x: x.argmin(-1, keepdim=True)),
    "equal": (lambda x: relax.op.equal(x, x), lambda x: x == x),
    "not_equal": (lambda x: relax.op.not_equal(x, x), torch.isnan),
    "min": (lambda x: relax.op.min(x, -1, keepdims=True), lambda x: x.amin(-1, keepdim=True)),
    "max_pool2d": (
        lambda x: relax.op.nn.max_pool2d(x, (3, 2), (2, 1), (1, 0, 1, 1)),
        lambda x: F.max_pool2d(F.pad(x, (0, 1, 1, 1), value=-np.inf), (3, 2), (2, 1)),
    ),
    "max_pool2d of whole numbers": (
        lambda x: relax.op.nn.max_pool2d(relax.op.astype(relax.op.clip(x, 0.0, 3.0), "uint8"), (2, 2)),
        lambda x: F.max_pool2d(x.clamp(0, 3).nan_to_num().byte().float(), 2, 1).byte(),
    ),
    "logical_not of a comparison": (
        lambda x: relax.op.logical_not(relax.op.less_equal(x, relax.const(0.0))),
        lambda x: ~(x <= 0),
    ),
    "logical_not of numbers": (lambda x: relax.op.logical_not(relax.op.trunc(x)), lambda x: x.trunc().logical_not()),
    "nothing of it": (lambda x: relax.op.multiply(x, relax.const(0.0)), lambda x: x * 0),
    "of nothing": (lambda x: relax.op.multiply(relax.const(np.zeros((5, 1, 1), "float32")), x), lambda x: 0 * x),
    "gelu": (relax.op.nn.gelu, F.gelu),
}


def picture() -> np.ndarray:
    x = 2 * np.random.RandomState(0).standard_normal((2, 5, 6, 5)).astype("float32")
    x[0, 1, 2, 3], x[0, 2, 5, 0], x[1, 0, 0, 0] = np.nan, np.inf, -np.inf
    x[1, 4], x[1, 2, 3] = np.nan, -np.inf
    return x


def graph(lowered: Callable[[relax.Var], relax.Expr]) -> tvm.IRModule:
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType(picture().shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            value = builder.emit_output(builder.emit(lowered(x)))
        builder.emit_func_output(value)
    lowered_too = [relax.transform.LegalizeOps(OPERATORS), relax.transform.AnnotateTIROpPattern()]
    together = [relax.transform.FuseOps(), relax.transform.FuseTIR()]
    return tvm.transform.Sequential([*lowered_too, *together])(builder.get())


def check(name: str, answer: np.ndarray) -> None:
    expected = CASES[name][1](torch.from_numpy(picture())).numpy()
    if name == "gelu":  # of infinity PyTorch itself makes now NaN, now infinity
        answer, expected = (np.where(np.isinf(picture()), 0.0, each) for each in (answer, expected))
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu(name: str) -> None:
    machine = relax.VirtualMachine(relax.build(graph(CASES[name][0]), tvm.target.Target("llvm")), tvm.cpu())
    check(name, machine["main"](tvm.runtime.tensor(picture())).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_on_opencl(name: str, tmp_path: Path) -> None:
    if not opencl.available()[0]:
        pytest.skip(opencl.available()[1])
    opencl.activate()
    target = tvm.target.Target({"kind": "opencl", "host": {"kind": "llvm"}})
    with target:
        mod = BindTheRest()(graph(CASES[name][0]))
    with generating_kernels(GENERIC):
        relax.build(mod, target).export_library(str(tmp_path / "k.so"))
    device = tvm.runtime.device("opencl", 0)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "k.so")), device)
    check(name, machine["main"](tvm.runtime.tensor(picture(), device)).numpy())
