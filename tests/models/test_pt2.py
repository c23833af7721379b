"""`.pt2` archives are data: good ones load, and nothing that an archive asks PyTorch to execute is executed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter
from torch.utils._pytree import tree_leaves

from saevit_tvm.models.opening import open_model
from saevit_tvm.models.pt2 import load_program
from saevit_tvm.support.errors import ModelError, UsageError

GRAPH, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS, SAMPLE = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.table = torch.arange(4.0).reshape(1, 4, 1, 1)
        self.register_buffer("hidden", torch.ones(1, 4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = torch.nn.functional.gelu(self.conv(x), approximate="tanh") * self.table + self.hidden
        return {"map": y, "rest": [y.mean((2, 3)), torch.einsum("bchw->bc", y)]}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Small().eval(), (torch.zeros(1, 3, 8, 8),)), path)
    return path


def rewrite(good: Path, path: Path, changes: dict[str, Callable[[Any], Any] | bytes]) -> Path:
    """A copy of the archive with some files changed (JSON by a function) or added (bytes)."""
    reader = PT2ArchiveReader(io.BytesIO(good.read_bytes()))
    records = {name: reader.read_bytes(name) for name in reader.archive_file.get_all_records()}
    for name, change in changes.items():
        if isinstance(change, bytes):
            records[name] = change
        else:
            content = json.loads(records[name])
            records[name] = json.dumps(change(content) or content).encode()
    with PT2ArchiveWriter(str(path)) as writer:
        for name, content in records.items():
            if not name.startswith(".data/") and name not in ("byteorder", "version"):
                writer.write_bytes(name, content)
    return path


def test_loads_what_was_exported(good: Path, tmp_path: Path) -> None:
    ours = load_program(rewrite(good, tmp_path / "copy.pt2", {})).module()
    x = torch.randn(1, 3, 8, 8)
    expected = torch.export.load(good).module()(x)
    with torch.no_grad():
        answer = ours(x)
    assert torch.equal(answer["map"], expected["map"])
    assert all(torch.equal(a, e) for a, e in zip(answer["rest"], expected["rest"], strict=True))


# Archives that want something executed ------------------------------


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch '{self.trace}'",)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def first_node(change: dict[str, Any]) -> Callable[[dict], None]:
    return lambda program: program["graph_module"]["graph"]["nodes"][0].update(change)


def root_signature(change: dict[str, Any]) -> Callable[[dict], None]:
    return lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(change)


def pickled_weight(config: dict) -> None:
    config["config"]["conv.weight"].update(use_pickle=True)


def opaque_constant(config: dict) -> None:
    config["config"]["table"].update(use_pickle=True, path_name="opaque_obj_0")


def renamed(code: str) -> Callable[[dict], dict]:
    return lambda program: json.loads(json.dumps(program).replace('"name": "conv2d"', json.dumps({"name": code})[1:-1]))


def argument(**value: Any) -> dict[str, Any]:
    return {"name": "", "arg": value, "kind": 1}


def attacks(trace: Path) -> dict[str, tuple[dict, str]]:
    touch = f"__import__('os').system('touch {trace}')"
    enum = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "y"})
    spec = json.dumps([1, {"type": "builtins.dict", "context": enum, "children_spec": []}])
    shell = {"target": "torch.os.system", "inputs": [argument(as_string=f"touch {trace}")], "outputs": []}
    save = {"target": "torch.ops.aten.save.default", "inputs": [argument(as_string="x")], "outputs": []}
    symbolic = {"as_expr": {"expr_str": touch, "hint": None}}
    return {
        "pickled weight": ({WEIGHTS: pickled_weight, "data/weights/weight_0": saved(Bomb(trace))}, "pickled code"),
        "pickled constant": (
            {CONSTANTS: opaque_constant, "data/constants/opaque_obj_0": pickle.dumps(Bomb(trace))},
            "more than one graph",
        ),
        "legacy weights": ({"data/weights/model.pt": saved(Bomb(trace))}, "more than one graph"),
        "compiled library": ({"data/aotinductor/model/x.so": b"\x7fELF"}, "more than one graph"),
        "function": ({GRAPH: first_node(shell)}, "calls 'torch.os.system'"),
        "dunder": ({GRAPH: first_node({"target": "torch.ops.aten.__class__.mro"})}, "which is not a tensor op"),
        "file operator": ({GRAPH: first_node(save)}, "reads or writes files"),
        "guards": ({GRAPH: lambda p: p.update(guards_code=[touch])}, "checks its shapes with"),
        "symbol": (
            {GRAPH: lambda p: p["graph_module"]["graph"]["tensor_values"]["x"].update(sizes=[symbolic])},
            "computes a shape with",
        ),
        "name": ({GRAPH: renamed(f"x={touch}")}, "uses the text"),
        "enum": ({GRAPH: root_signature({"in_spec": spec})}, "takes or returns builtins.dict"),
        "class": ({GRAPH: root_signature({"out_spec": spec.replace("builtins.dict", "os.Bomb")})}, "os.Bomb"),
    }


@pytest.mark.parametrize("kind", attacks(Path("trace")))
def test_nothing_is_executed(good: Path, tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "exploded"
    changes, sentence = attacks(trace)[kind]
    path = rewrite(good, tmp_path / "bad.pt2", changes)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_program(path)
    assert str(caught.value).startswith(f"'{path}' is refused because it ")
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["pickled weight", "pickled constant", "legacy weights", "symbol"])
def test_pytorch_itself_would_have_executed_it(good: Path, tmp_path: Path, kind: str) -> None:
    """When this fails PyTorch has become safer, and pt2.py may become shorter."""
    trace = tmp_path / "exploded"
    path = rewrite(good, tmp_path / "bad.pt2", attacks(trace)[kind][0])
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert trace.exists()


def test_example_inputs_are_not_even_read(good: Path, tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    path = rewrite(good, tmp_path / "bad.pt2", {SAMPLE: saved(Bomb(trace))})
    assert load_program(path).example_inputs is None
    assert not trace.exists()


# Archives that are no use -------------------------------------------


def test_infinity_and_the_lines_of_the_source_are_kept(tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 0, float("-inf")).exp()  # this line

    exported = torch.export.export(Masked(), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(exported, tmp_path / "masked.pt2")
    program, x = load_program(tmp_path / "masked.pt2"), torch.randn(1, 3, 8, 8)
    assert torch.equal(program.module()(x), Masked()(x))
    line = next(
        at for at, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# this line")
    )
    traces = [node.meta.get("stack_trace") or "" for node in program.graph.nodes if node.op == "call_function"]
    assert all(f'File "{__file__}", line {line}' in trace for trace in traces)


class Regions(torch.nn.Module):
    """Regions within regions, with values of the same names inside and outside; one hands on what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x).relu()
        with torch.no_grad():
            z = self.second(y).relu()
            with torch.autocast("cpu", enabled=False):
                a, b = self.first(z).relu().chunk(2, -1)
            z = z + 1
        w = self.first(z).relu()
        with torch.no_grad():
            kept, same = w.sin(), w.sin()
        return a * b, kept + same, w


@pytest.mark.parametrize("dynamic_width", [False, True])
def test_regions_within_a_model_are_part_of_it(tmp_path: Path, dynamic_width: bool) -> None:
    torch.manual_seed(0)
    module, x = Regions().eval(), torch.randn(2, 5, 6)
    shapes = ({1: torch.export.Dim("width", min=2, max=9)},) if dynamic_width else None
    program = torch.export.export(module, (x,), dynamic_shapes=shapes)
    assert "wrap_with" in str(program.graph)
    torch.export.save(program, tmp_path / "regions.pt2")
    found = load_program(tmp_path / "regions.pt2")
    assert "wrap_with" not in str(found.graph)
    with torch.no_grad():
        assert all(map(torch.equal, found.module()(x), module(x)))


class Autocast(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.dtype = torch.nn.Conv2d(3, 4, 3), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            y = self.conv(x).to(self.dtype)
            mask = torch.zeros(4, 1, 1, dtype=self.dtype)
        return (y + mask).relu().float().mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_asks_for_fewer_bits_gets_as_many_as_others(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = Autocast(dtype).eval(), torch.randn(1, 3, 8, 8)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "autocast.pt2")
    with torch.no_grad():
        answer = load_program(tmp_path / "autocast.pt2").module()(x)
        assert torch.equal(answer, module.conv(x).relu().mean((2, 3))) and not torch.equal(answer, module(x))


@pytest.mark.parametrize(("dtype", "outside"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_weights_of_sixteen_bits_are_computed_with_in_thirty_two(
    tmp_path: Path, dtype: torch.dtype, outside: torch.dtype
) -> None:
    """What goes in and comes out has the type that it had, where NumPy knows it."""
    torch.manual_seed(0)
    module, x = Small().eval().to(dtype), torch.randn(1, 3, 8, 8).to(dtype)
    module.table = module.table.to(dtype)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "narrow.pt2")
    source = open_model(str(tmp_path / "narrow.pt2"))
    assert source.inputs[0].dtype == str(outside).removeprefix("torch.")
    answers = source.original(x.to(outside).numpy())
    wide = module.float()
    wide.table = wide.table.float()
    with torch.no_grad():
        expected = wide(x.float())
    for answer, wanted in zip(answers, (expected["map"], *expected["rest"]), strict=True):
        assert np.array_equal(answer, wanted.to(outside).numpy())


class Tokens(torch.nn.Module):
    """Computes shapes of the extents of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.interpolate(self.conv(x), size=x.shape[2:], mode="nearest")
        y = y if x.shape[3] < 4 * x.shape[2] else y.relu()
        batch, channels, height, width = y.shape
        return y.flatten(2).transpose(1, 2).reshape(batch, height * width // 2, 2 * channels)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = {
        0: torch.export.Dim("batch", min=1, max=8),
        2: 4 * torch.export.Dim("quarter", min=2, max=16),
        3: torch.export.Dim("width", min=8, max=64),
    }
    torch.manual_seed(0)
    program = torch.export.export(Tokens().eval(), (torch.zeros(2, 3, 16, 12),), dynamic_shapes=(dims,))
    path = tmp_path_factory.mktemp("dynamic") / "dynamic.pt2"
    torch.export.save(program, path)
    return path


def test_dynamic_shapes_are_what_is_asked_for(dynamic: Path) -> None:
    source = open_model(str(dynamic), batch=3, image_size=(20, 34))
    assert source.input_shape == (3, 3, 20, 34) and source.recipe["image_size"] == [20, 34]
    torch.manual_seed(0)
    original, x = Tokens(), torch.randn(3, 3, 20, 34)
    with torch.no_grad():
        expected = original(x)
    assert np.abs(source.original(x.numpy())[0] - expected.numpy()).max() < 1e-6
    values = tree_leaves([node.meta.get("val") for node in source.exported().graph.nodes])
    assert all(type(extent) is int for value in values if value is not None for extent in value.shape)
    assert open_model(str(dynamic)).input_shape == (1, 3, 16, 12)  # the size that it was exported with


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 9}, "takes 1 to 8 as batch, not 9"),
        ({"image_size": (16, 65)}, "takes 8 to 64 as width, not 65"),
        ({"image_size": (68, 12)}, "takes 8 to 64 as height, not 68"),
        ({"image_size": (18, 12)}, "does not take 18 as height, which goes in steps"),
        ({"image_size": (8, 40)}, "was exported for other shapes, those with .*size"),
    ],
)
def test_shapes_beyond_what_was_exported_are_refused(dynamic: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_model(str(dynamic), **options)


class Squeezed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze().sum(-1)


def test_one_picture_goes_into_a_file_that_was_exported_for_two_or_more(tmp_path: Path) -> None:
    """PyTorch leaves 1 out of every batch that it finds open by itself; most models take it, and that is shown."""
    open_batch, given = ({0: torch.export.Dim.AUTO},), torch.zeros(4, 3, 16, 12)
    for module in (Tokens().eval(), Squeezed()):
        program = torch.export.export(module, (given,), dynamic_shapes=open_batch)
        torch.export.save(program, tmp_path / f"{type(module).__name__}.pt2")
    one, x = open_model(str(tmp_path / "Tokens.pt2")), np.random.RandomState(0).rand(5, 3, 16, 12).astype("float32")
    assert one.input_shape == (1, 3, 16, 12)
    (five,) = open_model(str(tmp_path / "Tokens.pt2"), batch=5).original(x)
    np.testing.assert_allclose(one.original(x[:1])[0], five[:1], rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="answers one otherwise than the first of two: give --batch 2 or more"):
        open_model(str(tmp_path / "Squeezed.pt2"))
    assert open_model(str(tmp_path / "Squeezed.pt2"), batch=2).input_shape[0] == 2


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os').system('true')",
        "Pow(Integer(9), Integer(999999999))",
        "Mod(Integer(1), Integer(0))",
        "Symbol('u0', integer=True)",
        "(lambda: 1)()",
        "Add((",
        "-" * 5000 + "1",
    ],
)
def test_formulas_are_data(dynamic: Path, tmp_path: Path, formula: str) -> None:
    def forge(program: dict) -> None:
        program["graph_module"]["graph"]["tensor_values"]["conv2d"]["sizes"][2]["as_expr"]["expr_str"] = formula

    with pytest.raises(ModelError, match=r"is refused because it (has|computes)|does not hold a program"):
        load_program(rewrite(dynamic, tmp_path / "forged.pt2", {GRAPH: forge}))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive" * 100])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt2").write_bytes(content)
    with pytest.raises(ModelError, match=r"not a readable \.pt2 archive"):
        load_program(tmp_path / "x.pt2")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_file(good: Path, tmp_path: Path, part: float) -> None:
    content = good.read_bytes()
    (tmp_path / "x.pt2").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ModelError, match=r"not a readable \.pt2 archive"):
        load_program(tmp_path / "x.pt2")


def test_graph_that_makes_no_sense(good: Path, tmp_path: Path) -> None:
    for change in (lambda p: p.pop("graph_module"), lambda p: p.update(schema_version={"major": 99, "minor": 0})):
        path = rewrite(good, tmp_path / "x.pt2", {GRAPH: lambda p, change=change: change(p) and None})
        with pytest.raises(ModelError, match="export it again"):
            load_program(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load_program(tmp_path / "x.pt2")
