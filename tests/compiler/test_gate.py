"""What is imported wrongly is not built, and the first operator that differs is named, with its line in the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import tvm
from torch import Tensor, nn
from tvm import relax

from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.importers import torch as importer
from saevit_tvm.models.opening import open_model, open_program
from saevit_tvm.support.errors import CompileError, ParityError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.layer(x))
        y = torch.selu(y - 0.5)  # the line that is named
        return y.mean((2, 3))


def exported(net: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(net.eval(), (torch.zeros(1, 3, 8, 8),), strict=False)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(text))


def test_what_tvm_imports_wrongly_is_refused_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "converters", dict)  # TVM's own rule leaves out the factors of SELU
    with pytest.raises(ParityError) as refused:
        import_model(open_program(exported(Net()), "net"))
    place = f"{__file__}:{line_of('# the line that is named')}"
    assert str(refused.value).startswith(f"TVM imports net wrongly: 'elu.default' computes something else ({place}).")


def test_it_is_named_behind_a_view_that_turns_signs_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.selu(torch.complex(x, x - 0.5).conj().imag)

    known = importer.converters()
    del known["elu.default"]
    monkeypatch.setattr(importer, "converters", lambda: dict(known))
    with pytest.raises(ParityError, match=r"'elu\.default' computes something else"):
        import_model(open_program(exported(Turned()), "turned"))


def test_operators_without_a_rule_are_all_named_with_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0(x) + torch.lgamma(x)  # both of them

    with pytest.raises(CompileError) as refused:
        import_model(open_program(exported(Two()), "two"))
    place = f"{__file__}:{line_of('# both of them')}"
    assert f"special_i0.default ({place})" in str(refused.value) or f"i0.default ({place})" in str(refused.value)
    assert f"lgamma.default ({place})" in str(refused.value)


def test_operators_that_have_no_rule_for_complex_numbers_are_named() -> None:
    class Waves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(torch.fft.fft(x))  # of complex numbers
            y = y + x.sum(-1, keepdim=True, dtype=torch.complex64)  # with a change of type
            return torch.log(y.abs()) + x

    with pytest.raises(CompileError) as refused:
        import_model(open_program(exported(Waves()), "waves"))
    places = [f"{__file__}:{line_of(end)}" for end in ("# of complex numbers", "# with a change of type")]
    assert str(refused.value) == (
        f"TVM cannot import waves: it uses operators without a rule: sum.dim_IntList of complex numbers ({places[1]}), "
        f"tanh.default of complex numbers ({places[0]}); replace that part of the model and try again."
    )


def test_products_of_real_numbers_keep_the_line_of_the_transform() -> None:
    class Waves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).abs()  # of all of them

    nodes = [node for node in importer.prepared(exported(Waves())).graph.nodes if node.op == "call_function"]
    assert {"matmul.default", "sqrt.default"} <= {node.target.__name__ for node in nodes}
    assert {importer.place(node) for node in nodes} == {f" ({__file__}:{line_of('# of all of them')})"}


def test_a_wrong_node_of_onnx_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm.relax.frontend.onnx import onnx_frontend

    helper = onnx.helper
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="first"),
        helper.make_node("Tanh", ["y"], ["z"], name="second"),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xz"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, tmp_path / "net.onnx")
    import_model(open_model(str(tmp_path / "net.onnx")))
    wrong = classmethod(lambda cls, bb, inputs, attr, params: relax.op.sigmoid(inputs[0]))
    monkeypatch.setattr(onnx_frontend.Tanh, "_impl_v7", wrong)
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ParityError, match=r"'Tanh' computes something else \(node 'second'\)"):
        import_model(open_model(str(tmp_path / "net.onnx")))


def test_loops_that_the_importer_writes_itself_are_computed_too(tmp_path: Path) -> None:
    """TVM has no operator of its graph for such a Pad, and makes loops at once."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    pads = helper.make_tensor("pads", onnx.TensorProto.INT64, [8], [0, 0, 1, 2, 0, 0, 0, 1])
    nodes = [helper.make_node("Pad", ["x", "pads"], ["y"], mode="constant"), helper.make_node("Tanh", ["y"], ["z"])]
    values = [
        helper.make_tensor_value_info(name, float32, shape)
        for name, shape in (("x", [1, 3, 8, 8]), ("z", [1, 3, 9, 11]))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [pads])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "n.onnx")
    mod = import_model(open_model(str(tmp_path / "n.onnx")))
    assert any(isinstance(func, tvm.tirx.PrimFunc) for func in mod.functions.values())


def test_an_onnx_file_is_simplified_first(tmp_path: Path) -> None:
    """Constants as nodes, and a shape that is computed: TVM takes neither for the shape of a Reshape."""
    helper, float32, int64 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    nodes = [
        helper.make_node("Constant", [], ["two"], value=helper.make_tensor("two", int64, [1], [2])),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Constant", [], ["index"], value=helper.make_tensor("index", int64, [1], [2])),
        helper.make_node("Gather", ["shape", "index"], ["height"]),
        helper.make_node("Div", ["height", "two"], ["half"]),
        helper.make_node("Constant", [], ["rest"], value=helper.make_tensor("rest", int64, [2], [1, -1])),
        helper.make_node("Concat", ["rest", "half"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    values = [
        helper.make_tensor_value_info(name, float32, shape) for name, shape in (("x", [1, 3, 8, 8]), ("z", [1, 48, 4]))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "n.onnx")
    mod = import_model(open_model(str(tmp_path / "n.onnx")))
    assert tuple(int(extent) for extent in mod["main"].ret_ty.shape) == (1, 48, 4)


def test_nan_is_like_nan_and_like_nothing_else() -> None:
    from saevit_tvm.compiler.importers.gate import _alike

    odd = np.array([np.nan, np.inf, 1.0])
    assert _alike(odd, odd)
    assert not _alike(np.array([0.0, np.inf, 1.0]), odd) and not _alike(np.array([np.nan, -np.inf, 1.0]), odd)
    assert not _alike(np.array([0.001]), np.array([0.002]))
