"""Primitives of anybody's model, each with all that follows it: what is found, and that it is computed rightly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor, nn
from tvm import relax, tirx

from relay_patterns import find_blocks, find_primitives
from saevit_tvm import backends, targets
from saevit_tvm.backends import nvrtc
from saevit_tvm.compiler import street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.passes import DeclareKernels, KeepTokens, RemoveNoOps
from saevit_tvm.compiler.passes.kernel_calls import read
from saevit_tvm.emulators import cuda as emulated
from saevit_tvm.models.opening import open_model, open_program
from saevit_tvm.runtime import opencl
from saevit_tvm.verbs.build import BuildOptions, build
from schedules.gpu import plan
from schedules.gpu.registry import kernel_of
from schedules.machines.gpus import GENERIC
from schedules.spec import KernelSpec

C = 8


class Residual(nn.Module):
    """conv -> BatchNorm -> ReLU -> conv -> BatchNorm, added to what is from elsewhere, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.other(self.two(F.relu(self.norm(self.one(x))))))


class Inverted(nn.Module):
    """1x1, SiLU, depthwise 5x5 with stride 2, ReLU6, 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(C, 3 * C, 1), nn.Conv2d(3 * C, C, 1)
        self.depthwise = nn.Conv2d(3 * C, 3 * C, 5, stride=2, padding=2, groups=3 * C)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.depthwise(F.silu(self.expand(x)))))


class Bottlenecks(nn.Module):
    """MobileNetV4's, in all its forms: with a depthwise convolution before, in the middle, at both places, nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.wide, self.narrow = (nn.ModuleList(nn.Conv2d(*io, 1) for _ in range(3)) for io in ((C, 24), (24, C)))
        self.middle = nn.ModuleList(nn.Conv2d(24, 24, 5, stride, 2, groups=24) for stride in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.narrow[0](F.relu(self.middle[0](F.relu(self.wide[0](self.start(x))))))
        x = self.narrow[1](F.relu(self.middle[1](F.relu(self.wide[1](x)))))
        return x + self.narrow[2](F.relu(self.wide[2](x)))


class Stage(nn.Module):
    """Bottlenecks as others have them: one that changes the size, then one added to what that gave, and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = (nn.ModuleList(nn.Conv2d(*io, 1) for _ in range(2)) for io in ((C, 24), (24, C)))
        self.middle = nn.ModuleList(nn.Conv2d(24, 24, 3, stride, 1, groups=24) for stride in (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow[0](F.relu(self.middle[0](F.relu(self.wide[0](x)))))
        return F.relu(self.narrow[1](F.relu(self.middle[1](F.relu(self.wide[1](x))))) + x)


class Mixer(nn.Module):
    """Two linear layers over tokens, the second added to what went in."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(C, 3 * C), nn.Linear(3 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return tokens + self.narrow(F.gelu(self.wide(tokens)))


class Attending(nn.Module):
    """Attention between linear layers, with a mask, as PyTorch's own function does it; LeViT's has an activation."""

    def __init__(self, masked: bool = False, active: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.active = active or nn.Identity()
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.bias = nn.Parameter(torch.randn(1, 2, 64, 64)) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        split = self.qkv(self.norm(tokens)).reshape(1, -1, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split, attn_mask=self.bias)
        return tokens + self.out(self.active(mixed.transpose(1, 2).reshape(tokens.shape)))


class TwoWays(nn.Module):
    """Two convolutions, added: one of them takes the sum along."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(C, C, 3, padding=2, dilation=2), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x) + self.two(x))


class Uneven(nn.Module):
    """What no published block has: other strides, paddings and dilations each way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, (3, 1), stride=(2, 1), dilation=(2, 1), bias=False)
        self.depthwise = nn.Conv2d(C, C, (1, 7), padding=(0, 3), groups=C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.depthwise(F.pad(self.conv(x), (0, 1, 0, 0))))


class Pooled(nn.Module):
    """Windows and means, and a softmax over classes."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), 2)
        return self.out(x.mean((2, 3))).softmax(-1)


class Scaled(nn.Module):
    """LayerScale behind a convolution, a depthwise one and a linear layer: in their weights, it costs nothing.

    Neither does the first one's residual, which is what it sees itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False)
        self.linear = nn.Linear(C, C)
        self.image, self.token = nn.Parameter(torch.randn(C, 1, 1)), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.image * self.conv(x)
        x = F.relu(self.depthwise(x) * self.image + 0.5 * self.image)
        tokens = x.flatten(2).transpose(1, 2)
        return tokens + 2.0 * (self.token * self.linear(tokens))


class Gated(nn.Module):
    """Squeeze-and-excite gates of one tensor on another, in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.conv = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = F.relu(self.conv(x) * gate)
        x = gate * self.depthwise(x) + x
        return F.max_pool2d(x, 3, 1, 1) * gate


class OwnGate(nn.Module):
    """A gate that is computed from what it multiplies: the kernel before cannot have it."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.conv = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        return x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))


class Endings(nn.Module):
    """All that may follow a norm, a softmax, pooling and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.scale, self.offset = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(F.avg_pool2d(x, 3, 1, 1) * self.scale[:, None, None] + x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.relu(self.norm(tokens) * self.scale + 1.0) + self.offset
        tokens = self.scale * F.softmax(tokens, -1) + tokens
        return tokens, torch.sigmoid(x.mean((2, 3)) + self.offset)


class Attended(nn.Module):
    """Attention that its own values gate, by head."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(1, 2, C // 2, 64).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(heads, torch.relu(heads), heads)
        return torch.sigmoid(mixed * 0.5) * heads


class Active(nn.Module):
    """Activations that PyTorch writes as several operators, or that have numbers of their own."""

    STEPS: ClassVar = {
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "leaky:0.2": nn.LeakyReLU(0.2),
        "mish": nn.Mish(),
        "elu": nn.ELU(),
        "hardswish": nn.Hardswish(),
        "hardsigmoid": nn.Hardsigmoid(),
        "clip:-0.5:2.0": nn.Hardtanh(-0.5, 2.0),
    }

    def __init__(self) -> None:
        super().__init__()
        layers = ((nn.Conv2d(C, C, 1, bias=False), active) for active in self.STEPS.values())
        self.layers = nn.Sequential(*(each for layer in layers for each in layer))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Batched(nn.Module):
    """Attention of products of batches, where images and heads are one axis."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(2, C // 2, 64).transpose(1, 2)
        shares = torch.softmax(0.5 * (heads @ torch.relu(heads).transpose(1, 2)), -1)
        return shares @ heads + heads


class Whole(nn.Module):
    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.stem, self.behind = nn.Conv2d(3, C, 3, padding=1), behind

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.behind(torch.tanh(self.stem(x)))


class Groups(nn.Module):
    """Group norm, LayerScale, and what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.GroupNorm(2, C), nn.Parameter(torch.randn(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.scale * self.norm(x))


class Windowed(nn.Module):
    """Windows of a picture as a batch; two masks of constants: one by head, one by window."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.windows = nn.Parameter(torch.randn(2, 16, 16)), nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).reshape(4, 16, 2, C // 2)
        heads = x.transpose(1, 2)
        scores = heads @ torch.relu(heads).transpose(2, 3) + self.heads
        scores = (scores.view(1, 4, 2, 16, 16) + self.windows.view(1, 4, 1, 16, 16)).view(4, 2, 16, 16)
        return scores.softmax(-1) @ torch.sin(heads)


class Linearised(nn.Module):
    """Attention without a softmax: keys times values first."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(2, C // 2, 64).transpose(1, 2)
        queries, keys = torch.relu(heads), torch.relu(-heads)
        return queries @ (keys.transpose(1, 2) @ heads) + heads


class Grouped(nn.Module):
    """As in ResNeXt and RegNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Ghost(nn.Module):
    """A few channels, and as many made of each of them; then all are gated by place, and once only moved apart."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Conv2d(C, C, 1)
        self.more, self.after = (nn.Conv2d(C, C, 3, padding=1, groups=C) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        few = F.relu(self.few(x))
        whole = torch.cat([few, F.relu(self.more(few))], 1)
        turned = torch.cat([self.after(x), x], 1)
        return whole * torch.sigmoid(turned.flip(2)), turned


STEM = "conv bias tanh"
EXPECTED = {
    "residual": (Residual(), [STEM, "conv bias relu", "conv bias add residual relu"]),
    "inverted": (Inverted(), [STEM, "conv bias silu", "depthwise bias relu6", "conv bias"]),
    "bottlenecks": (
        Bottlenecks(),
        [STEM, "depthwise bias", "uib bias add residual", "uib bias", "uib bias add residual"],
    ),
    "stage": (Stage(), [STEM, "uib bias", "uib bias add residual relu"]),
    "mixer": (Mixer(), [STEM, "linear bias gelu", "linear bias add residual"]),
    "attention": (
        Attending(),
        [STEM, "layer_norm", "linear bias", "attention", "linear bias add residual"],
    ),
    "masked attention": (
        Attending(masked=True),
        [STEM, "layer_norm", "linear bias", "attention", "linear bias add residual"],
    ),
    "active attention": (
        Attending(active=F.hardswish),
        [STEM, "layer_norm", "linear bias", "attention hardswish", "linear bias add residual"],
    ),
    "windowed": (Windowed(), [STEM, "attention"]),
    "groups": (Groups(), [STEM, "group_norm add residual relu"]),
    "two ways": (TwoWays(), [STEM, "conv bias", "conv bias add residual tanh"]),
    "uneven": (Uneven(), [STEM, "conv", "depthwise bias sigmoid"]),
    "pooled": (Pooled(), [STEM, "pool", "pool", "head", "softmax"]),
    "scaled": (Scaled(), [STEM, "conv bias", "depthwise bias relu", "linear bias add residual"]),
    "gated": (
        Gated(),
        [
            *(STEM, "mean", "conv bias sigmoid", "conv bias multiply residual relu"),
            *("depthwise bias multiply residual add residual1", "pool multiply residual"),
        ],
    ),
    "own gate": (OwnGate(), [STEM, "conv bias silu", "mean", "conv bias sigmoid"]),
    "endings": (
        Endings(),
        [
            *(STEM, "pool scale add residual tanh", "layer_norm relu bias"),
            *("softmax scale add residual", "mean bias sigmoid"),
        ],
    ),
    "active": (Active(), [STEM, *(f"conv {step}" for step in Active.STEPS)]),
    "batched": (Batched(), [STEM, "attention add residual"]),
    "grouped": (Grouped(), [STEM, "conv bias relu"]),
    "linearised": (Linearised(), [STEM, "matmul", "matmul add residual"]),
    "ghost": (Ghost(), [STEM, "conv bias relu", "depthwise bias", "depthwise bias relu beside multiply residual"]),
    "attended": (Attended(), [STEM, "attention scale sigmoid multiply residual"]),
}


def exported(behind: nn.Module) -> torch.export.ExportedProgram:
    """With weights and statistics that are not trivial."""
    net = Whole(behind).eval()
    random = torch.Generator().manual_seed(3)
    for key, value in net.state_dict().items():
        if value.is_floating_point():
            value.normal_(0.0, 0.5, generator=random)
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
    return torch.export.export(net, (torch.randn(1, 3, 8, 8, generator=random),), strict=False)


def found(name: str, accepts: Callable[[KernelSpec], bool]) -> list[str]:
    """What is declared of a model, in its order: the operation and its epilogue."""
    program, target = exported(EXPECTED[name][0]), tvm.target.Target(targets.native().tvm)
    mod = import_model(open_program(program))
    blocks, primitives = (DeclareKernels(find, accepts) for find in (find_blocks, find_primitives))
    mod = street.run(mod, [*street.simplify(), blocks, KeepTokens(), RemoveNoOps(), primitives], target)
    calls = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    specs = [call.spec for call in (read(mod, each) for each in calls if isinstance(each, relax.Call)) if call]
    return [" ".join([spec.op, *spec.epilogue.steps]) for spec in specs]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found(name: str) -> None:
    assert found(name, lambda _spec: True) == EXPECTED[name][1]


def test_a_spec_that_is_refused_is_offered_with_less() -> None:
    """A generator that cannot add a residual still gets the convolution before it."""
    assert found("residual", lambda spec: not spec.epilogue.operands) == [STEM, "conv bias relu", "conv bias"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "scaled", "endings", "groups", "linearised"])
def test_a_gpu_takes_all_of_them_too(name: str) -> None:
    assert found(name, lambda spec: plan.accepts(spec, GENERIC)) == EXPECTED[name][1]


class All(nn.Module):
    """All of them, or some, side by side."""

    def __init__(self, names: Iterable[str] = EXPECTED) -> None:
        super().__init__()
        self.parts = nn.ModuleList(EXPECTED[name][0] for name in names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results = (part(x) for part in self.parts)
        return tuple(each for result in results for each in (result if isinstance(result, tuple) else (result,)))


MOVING = ("windowed", "groups")  # windows that are moved, and a norm over images
TOKENS = ("masked attention", "pooled")  # with all kinds of primitives but depthwise convolutions


@pytest.mark.slow
def test_what_is_left_to_the_rules_of_a_gpu_moves_numbers(tmp_path: Path) -> None:
    """On any of them, whatever device there is here."""
    torch.export.save(exported(All(TOKENS)), tmp_path / "net.pt2")
    source, target = open_model(str(tmp_path / "net.pt2")), targets.get("generic-opencl")
    recipe = street.Recipe(source, target)
    mod = street.walked(backends.get("opencl"), recipe, street.Found(), street.Dump(), last="kernels")
    kernels = {name.name_hint: func for name, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    ours = {kernel.NAME: kernel for kernel in map(kernel_of, kernels.values()) if kernel}
    assert ours.keys() == {"conv", "layer_norm", "linear", "attention", "pool", "head", "softmax"}
    rest = [name for name, func in kernels.items() if kernel_of(func) is None]
    moving = re.compile(r"(fused|_|\d|reshape|transpose|squeeze|strided_slice)+")
    assert rest and all(map(moving.fullmatch, rest))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "names", "rules"),
    [
        ("native", "float32", EXPECTED, 21),
        ("generic-opencl", "float32", [name for name in EXPECTED if name not in MOVING], 27),
        ("generic-opencl", "float32", MOVING, 6),
        ("generic-opencl", "float16", TOKENS, 6),
        ("cuda-sm_90", "float16", TOKENS, 6),
    ],
    ids=["native", "opencl", "opencl moving", "opencl half", "cuda half"],
)
def test_they_are_computed_rightly(target: str, dtype: str, names: Iterable[str], rules: int, tmp_path: Path) -> None:
    """A build compares the artifact with PyTorch. At most so many kernels are left to the rules, which move numbers."""
    if target == "generic-opencl" and not opencl.available()[0]:
        pytest.skip(opencl.available()[1])
    if target.startswith("cuda") and (lacking := nvrtc.missing() or emulated.missing()):
        pytest.skip(lacking)
    torch.export.save(exported(All(names)), tmp_path / "net.pt2")
    made = build(BuildOptions(str(tmp_path / "net.pt2"), target, dtype=dtype, out=tmp_path / "out"), lambda _line: None)
    proof = made.manifest["verification"]
    assert 0 < proof.get("arithmetic", proof)["max_rel_error"] < (2e-5 if dtype == "float32" else 3e-3)
    assert made.manifest["kernels"]["fallback"] <= rules
