"""Half precision in the graph: what is stored in float16, and what is computed in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from relay_patterns import find_blocks, find_primitives
from saevit_tvm import targets
from saevit_tvm.backends import cpu
from saevit_tvm.compiler import street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.passes import DeclareKernels
from saevit_tvm.models.opening import open_model, open_program
from schedules.machines.cpus import isa_of
from schedules.spec import KernelSpec

RPI5 = targets.get("rpi5")


class Net(nn.Module):
    """Operators that are no region of ours, in both groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1, dilation=2)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(torch.relu(self.conv(x)).permute(0, 2, 3, 1))
        a, b = torch.split(y, 4, dim=-1)
        y = torch.cat([b, a], dim=-1) * a.softmax(-1).sum(-1, keepdim=True)
        return self.linear(y), y.mean((1, 2))


def has_kernel(spec: KernelSpec) -> bool:
    """Not what `Net` is made of: that is left to the rules."""
    return spec.op in ("saa", "ciffn", "dwsconv", "head", "conv") and spec.get("dilation") == (1, 1)


def lowered(mod: tvm.IRModule) -> tvm.IRModule:
    for passes in (
        street.simplify(),
        [DeclareKernels(find, has_kernel) for find in (find_blocks, find_primitives)],
        cpu.precision("float16"),
    ):
        mod = street.run(mod, passes, tvm.target.Target(RPI5.tvm))
    return mod


def calls(mod: tvm.IRModule) -> list[tuple[str, list[str], str]]:
    """Every call of `main`: its name, the types of its tensors, and that of its result."""
    found = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call):
            name = expr.op.name_hint if isinstance(expr.op, tvm.ir.GlobalVar) else expr.op.name
            types = [str(each.ty.dtype) for each in expr.args if isinstance(each.ty, relax.TensorType)]
            found.append((name, types, str(getattr(expr.ty, "dtype", ""))))

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, tvm.IRModule]:
    torch.manual_seed(0)
    module = Net().eval()
    exported = torch.export.export(module, (torch.randn(1, 3, 8, 8),), strict=False)
    return module, lowered(import_model(open_program(exported)))


def test_sums_and_transcendentals_are_computed_in_float32(net: tuple[nn.Module, tvm.IRModule]) -> None:
    told = {name: (types, result) for name, types, result in calls(net[1])}
    for name in ("relax.nn.layer_norm", "relax.nn.softmax", "relax.sum", "relax.mean"):
        assert set(told[name][0]) == {"float32"} and told[name][1] == "float32", name
    for name in ("relax.nn.conv2d", "relax.matmul"):
        assert set(told[name][0]) == {"float16"} and told[name][1] == "float32", name
    for name in ("relax.nn.relu", "relax.multiply"):
        assert set(told[name][0]) == {"float16"} and told[name][1] == "float16", name


def test_it_computes_the_same_and_gives_float32(net: tuple[nn.Module, tvm.IRModule]) -> None:
    module, mod = net
    target = tvm.target.Target(targets.native().tvm)
    for passes in (cpu.layout(), cpu.kernels(), cpu.schedules(None, isa_of(RPI5.tvm), 1)):
        mod = street.run(mod, passes, target)
    mod = street.run(mod, street.virtual_machine(), target)
    machine = relax.VirtualMachine(relax.build(mod, target, relax_pipeline=None), tvm.cpu())
    x = np.random.RandomState(0).standard_normal((1, 3, 8, 8)).astype("float32")
    answers = [each.numpy() for each in machine["main"](tvm.runtime.tensor(x))]
    with torch.no_grad():
        expected = [each.numpy() for each in module(torch.from_numpy(x))]
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.dtype == np.float32
        assert 1e-6 < np.abs(answer - wanted).max() < 4e-3 * max(1, np.abs(wanted).max())


def test_regions_read_and_give_float16() -> None:
    """One kernel each and nothing between them: the picture goes in as it is, and one cast makes the answer."""
    mod = lowered(import_model(open_model("saevit_micro", image_size=32)))
    mod = street.run(mod, cpu.layout(), tvm.target.Target(RPI5.tvm))
    *regions, last = calls(mod)
    assert {name for name, _, _ in regions} == {"relax.call_tir"} and len(regions) == 18
    assert {result for _, _, result in regions} == {"float16"}
    assert last == ("relax.astype", ["float16"], "float32")
    stored = [[str(param.dtype) for param in (func.params[0], func.params[-1])] for func in _kernels(mod)]
    assert sorted(map(tuple, stored))[-1] == ("float32", "float16") and stored.count(["float32", "float16"]) == 1


def _kernels(mod: tvm.IRModule) -> list[tvm.tirx.PrimFunc]:
    return [func for func in mod.functions.values() if isinstance(func, tvm.tirx.PrimFunc)]


def test_float32_is_left_alone() -> None:
    assert cpu.precision("float32") == []
