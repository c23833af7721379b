"""ONNX files as the field writes them: shapes computed in the graph, extents left open, operators of many years."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import tvm
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from tvm import relax

from saevit_tvm.compiler.importers import gate, import_model
from saevit_tvm.compiler.importers.evaluate import evaluate
from saevit_tvm.models.opening import open_model
from saevit_tvm.runtime.tensors import drawn
from saevit_tvm.support.errors import CompileError, ModelError, ParityError
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.verify import verify

OPSETS = [9, pytest.param(11, marks=pytest.mark.slow), 13, pytest.param(17, marks=pytest.mark.slow), 21]
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
END = 2**63 - 1


class Writer:
    """Writes nodes as a converter does for one version of the operators; numbers become constants."""

    def __init__(self, opset: int, shape: Sequence[int | str], constants_are_nodes: bool = False) -> None:
        self.opset, self.constants_are_nodes = opset, constants_are_nodes
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.random = np.random.RandomState(0)
        self.input = helper.make_tensor_value_info("x", FLOAT, shape)

    def __call__(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        results = [f"{op}{len(self.nodes)}_{at}" for at in range(outputs)]
        self.nodes.append(helper.make_node(op, names, results, results[0], **attributes))
        return results[0] if outputs == 1 else results

    def constant(self, value: Any) -> str:
        value = np.asarray(value)
        tensor = numpy_helper.from_array(
            value.astype(np.float32) if value.dtype == np.float64 else value,
            f"constant{len(self.nodes)}_{len(self.constants)}",
        )
        if self.constants_are_nodes:
            self.nodes.append(helper.make_node("Constant", [], [tensor.name], value=tensor))
        else:
            self.constants.append(tensor)
        return tensor.name

    def weight(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))

    def model(self, output: str, rank: int) -> Any:
        result = helper.make_tensor_value_info(output, FLOAT, [f"open{axis}" for axis in range(rank)])
        graph = helper.make_graph(self.nodes, "graph", [self.input], [result], self.constants)
        domains = {node.domain: 1 for node in self.nodes} | {"": self.opset}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    # What is an attribute in old versions, and an input in new ones.

    def _since(self, version: int, op: str, x: str, name: str, value: Any, **attributes: Any) -> str:
        if self.opset >= version:
            return self(op, x, np.array(value), **attributes)
        return self(op, x, **{name: value}, **attributes)

    def unsqueeze(self, x: str, axis: int) -> str:
        return self._since(13, "Unsqueeze", x, "axes", [axis])

    def squeeze(self, x: str, *axes: int) -> str:
        return self._since(13, "Squeeze", x, "axes", list(axes))

    def mean(self, x: str, *axes: int) -> str:
        return self._since(18, "ReduceMean", x, "axes", list(axes), keepdims=0)

    def pad(self, x: str, pads: list[int], mode: str = "constant") -> str:
        return self._since(11, "Pad", x, "pads", pads, mode=mode)

    def clip(self, x: str, low: float, high: float) -> str:
        if self.opset >= 11:
            return self("Clip", x, np.float32(low), np.float32(high))
        return self("Clip", x, min=low, max=high)

    def part(self, x: str, start: int, end: int, axis: int = 0) -> str:
        if self.opset >= 10:
            return self("Slice", x, [start], [end], [axis])
        return self("Slice", x, starts=[start], ends=[end], axes=[axis])

    def softmax(self, x: str, rank: int) -> str:
        return self("Softmax", x, axis=-1 if self.opset >= 13 else rank - 1)

    def extent(self, x: str, axis: int) -> str:
        """As PyTorch writes `x.shape[axis]` where it goes into another shape."""
        return self.unsqueeze(self("Gather", self("Shape", x), np.int64(axis), axis=0), 0)


def pytorch_attention(opset: int) -> Any:
    """The batch from a Shape, a class token that is expanded, three parts of one product, the first token."""
    at = Writer(opset, ["batch", 3, 8, 8], constants_are_nodes=True)
    x = at("Conv", "x", at.weight(6, 3, 4, 4), at.weight(6), kernel_shape=[4, 4], strides=[4, 4])
    batch = at.extent(x, 0)
    x = at("Reshape", x, at("Concat", batch, at.extent(x, 1), [-1], axis=0))
    x = at("Transpose", x, perm=[0, 2, 1])
    wanted = at("Reshape", at("Concat", batch, [-1], [-1], axis=0), [-1])
    ones = at("ConstantOfShape", at("Shape", wanted), value=helper.make_tensor("one", INT64, [1], [1]))
    wanted = at("Where", at("Equal", wanted, at("Mul", ones, np.int64(-1))), ones, wanted)
    x = at("Concat", at("Expand", at.weight(1, 1, 6), wanted), x, axis=1)
    together = at("Add", at("MatMul", x, at.weight(6, 18)), at.weight(18))
    tokens = at.extent(together, 1)
    together = at("Reshape", together, at("Concat", batch, tokens, [3], [2], [3], axis=0))
    together = at("Transpose", together, perm=[2, 0, 3, 1, 4])
    query, key, value = (at("Gather", together, np.int64(which), axis=0) for which in range(3))
    width = at("Cast", at.part(at("Shape", query), -1, END), to=FLOAT)
    query = at("Mul", query, at("Div", [1.0], at("Sqrt", width)))
    shares = at.softmax(at("MatMul", query, at("Transpose", key, perm=[0, 1, 3, 2])), 4)
    x = at("Transpose", at("MatMul", shares, value), perm=[0, 2, 1, 3])
    x = at("Reshape", x, at("Concat", batch, tokens, [6], axis=0))
    return at.model(at("Gather", x, np.int64(0), axis=1), 2)


def pytorch_shapes(opset: int) -> Any:
    """A slice up to half the height, negative places, pads made of parts, a product of extents; a batch of -1."""
    at = Writer(opset, [-1, 3, 8, 8], constants_are_nodes=True)
    if opset < 10:
        x = at.part("x", 0, 4, 2)
    else:
        half = at("Div", at("Gather", at("Shape", "x"), np.int64(2), axis=0), np.int64(2))
        x = at("Slice", "x", [0], at.unsqueeze(half, 0), [2])
    x = at("Sub", at("Concat", x, x, axis=2), at.part("x", -8, END, 3))
    x = at("Gather", x, [2, -1, 0], axis=1)
    if opset < 11:
        x = at.pad(x, [0, 0, 1, 2, 0, 0, 1, 0], "reflect")
    else:
        pads = at(
            "Cast", at("Concat", np.array([0, 0, 1, 2], "int32"), np.array([0, 0, 1, 0], "int32"), axis=0), to=INT64
        )
        x = at("Pad", x, pads, mode="reflect")
    positions = at._since(18, "ReduceProd", at.part(at("Shape", x), 2, 4), "axes", [0], keepdims=1)
    x = at("Reshape", x, at("Concat", [0], [-1], positions, axis=0))
    return at.model(at.mean(x, -1), 2)


def pytorch_range(opset: int) -> Any:
    """Positions along an open width: what is not zero of ones, before there was a Range."""
    at = Writer(opset, ["batch", 3, 8, "width"], constants_are_nodes=True)
    if opset < 11:
        ones = at("ConstantOfShape", at.extent("x", 3), value=helper.make_tensor("one", INT64, [1], [1]))
        places = at.squeeze(at("Transpose", at("NonZero", ones), perm=[1, 0]), 1)
    else:
        places = at("Range", np.int64(0), at.squeeze(at.extent("x", 3), 0), np.int64(1))
    x = at("Add", "x", at("Mul", at("Cast", places, to=FLOAT), np.float32(0.1)))
    return at.model(at("Tanh", x), 4)


def pytorch_squeeze(opset: int) -> Any:
    """Where PyTorch's exporter does not know an extent, it writes both ways and a condition."""
    at = Writer(opset, [1, 3, 8, 8], constants_are_nodes=True)
    x = at("Conv", "x", at.weight(1, 3, 3, 3), at.weight(1), kernel_shape=[3, 3])
    is_one = at("Equal", at("Gather", at("Shape", x), np.int64(1), axis=0), np.int64(1))
    within = Writer(opset, [])
    ways = [within.squeeze(x, 1), within("Identity", x)]
    values = [helper.make_tensor_value_info(name, FLOAT, None) for name in ways]
    then, otherwise = (
        helper.make_graph([node], name, [], [value], within.constants if name == "then" else [])
        for name, node, value in zip(("then", "else"), within.nodes, values, strict=True)
    )
    return at.model(at("Relu", at("If", is_one, then_branch=then, else_branch=otherwise)), 3)


def keras_classifier(opset: int) -> Any:
    """Channels last, permutes round every convolution, a shape by StridedSlice and Pack, depthwise weights turned."""
    at = Writer(opset, ["unk__1", 32, 32, 3])
    x = at("Transpose", "x", perm=[0, 3, 1, 2])
    x = at("Conv", x, at.weight(8, 3, 3, 3), at.weight(8), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    x = at.clip(x, 0.0, 6.0)
    weight = at("Reshape", at("Transpose", at.weight(3, 3, 8, 1), perm=[2, 3, 0, 1]), [8, 1, 3, 3])
    x = at("Conv", x, weight, kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=8)
    scale, offset, mean = at.weight(8), at.weight(8), at.weight(8)
    x = at("BatchNormalization", x, scale, offset, mean, np.abs(at.weight(8)) + 0.5, epsilon=1e-3)
    x = at("Transpose", at("Relu", x), perm=[0, 2, 3, 1])
    batch = at.squeeze(at.part(at("Cast", at("Shape", x), to=INT32), 0, 1), 0)
    rest = (np.array([each], "int32") for each in (-1, 8))
    wanted = at("Cast", at("Concat", at.unsqueeze(batch, 0), *rest, axis=0), to=INT64)
    means = at.mean(at("Reshape", x, wanted), 1)
    again = at.squeeze(at("GlobalAveragePool", at("Transpose", x, perm=[0, 3, 1, 2])), 2, 3)
    x = at("Add", at("MatMul", at("Concat", means, again, axis=1), at.weight(16, 5)), at.weight(5))
    return at.model(at.softmax(x, 2), 2)


def keras_decoder(opset: int) -> Any:
    """Padding by name, a size from a StridedSlice, empty inputs of Resize, a deconvolution that says its size."""
    at = Writer(opset, [1, 16, 16, 3])
    x = at("Transpose", "x", perm=[0, 3, 1, 2])
    x = at("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    x = at("LeakyRelu", at("Conv", x, at.weight(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"), alpha=0.2)
    if opset >= 11:
        size = at.part(at("Cast", at("Shape", at("Transpose", x, perm=[0, 2, 3, 1])), to=INT32), 1, 3)
        size = at("Cast", at("Mul", size, np.array([2, 2], "int32")), to=INT64)
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        none = np.zeros(0)
        x = at("Resize", x, none, none, at("Concat", at.part(at("Shape", x), 0, 2), size, axis=0), **how)
    x = at("Transpose", x, perm=[0, 2, 3, 1])
    x = at("Transpose", at.pad(x, [0, 1, 1, 0, 0, 1, 1, 0]), perm=[0, 3, 1, 2])
    size = {"output_shape": [20, 20]} if opset >= 11 else {}
    x = at("ConvTranspose", x, at.weight(4, 2, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER", **size)
    return at.model(at("Transpose", x, perm=[0, 2, 3, 1]), 4)


def paddle_detector(opset: int) -> Any:
    """Names for all open extents, hardswish in its parts, squeeze and excitation, Resize to the size of another."""
    at = Writer(opset, ["DynamicDimension.0", 3, "DynamicDimension.1", "DynamicDimension.2"])
    x = at("Conv", "x", at.weight(8, 3, 3, 3), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    scale, offset, mean = at.weight(8), at.weight(8), at.weight(8)
    x = at("BatchNormalization", x, scale, offset, mean, np.abs(at.weight(8)) + 0.5, epsilon=1e-5)
    x = at("HardSwish", x) if opset >= 14 else at("Mul", x, at("Div", at.clip(at("Add", x, [3.0]), 0.0, 6.0), [6.0]))
    gate = at("Relu", at("Conv", at("GlobalAveragePool", x), at.weight(4, 8, 1, 1)))
    x = at("Mul", x, at("HardSigmoid", at("Conv", gate, at.weight(8, 4, 1, 1)), alpha=0.2, beta=0.5))
    low = at("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    if opset >= 11:
        size = at("Concat", at.part(at("Shape", low), 0, 2), at.part(at("Shape", x), 2, 4), axis=0)
        how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        up = at("Resize", low, np.zeros(0), np.zeros(0), size, **how)
    else:
        up = at("Upsample", low, [1.0, 1.0, 2.0, 2.0], mode="nearest")
    x = at.pad(at("Concat", x, up, axis=1), [0, 0, 1, 1, 0, 0, 1, 1])
    x = at("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2])
    channels = at("Cast", at("Cast", at.part(at("Shape", x), 0, 2), to=INT32), to=INT64)
    x = at("Transpose", at("Reshape", x, at("Concat", channels, [-1], axis=0)), perm=[0, 2, 1])
    x = at("Add", at("MatMul", x, at.weight(16, 7)), at.weight(7))
    return at.model(at.softmax(x, 3), 3)


GRAPHS: list[Callable[[int], Any]] = [
    pytorch_attention,
    pytorch_shapes,
    pytorch_range,
    pytorch_squeeze,
    keras_classifier,
    keras_decoder,
    paddle_detector,
]


def imported(model: Any, folder: Path, **options: Any) -> tvm.IRModule:
    """Importing compares with onnxruntime, too."""
    onnx.save(model, folder / "model.onnx")
    return import_model(open_model(str(folder / "model.onnx"), **options))


def operators_of(mod: tvm.IRModule) -> set[str]:
    found: set[str] = set()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            found.add(expr.op.name)

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_no_shape_is_computed_at_an_inference(graph: Callable[[int], Any], opset: int, tmp_path: Path) -> None:
    if (graph, opset) == (pytorch_squeeze, 9):
        return  # onnxruntime takes no two ways of different rank there
    model = graph(opset)
    is_open = not model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    mod = imported(model, tmp_path, image_size=16 if is_open else None)
    for binding in (each for block in mod["main"].body.blocks for each in block.bindings):
        assert not isinstance(binding.var.ty, relax.ShapeType)
        assert all(isinstance(extent, tvm.tirx.IntImm) for extent in getattr(binding.var.ty, "shape", []) or [])
    assert not [name for name in operators_of(mod) if "shape" in name and name != "relax.reshape"]


def test_an_open_batch_is_the_users(tmp_path: Path) -> None:
    mod = imported(pytorch_attention(13), tmp_path, batch=3)
    assert [int(extent) for extent in mod["main"].ret_ty.shape] == [3, 6]


@pytest.mark.parametrize("opset", [9, 17])
def test_bounds_are_numbers_that_kernels_take_up(opset: int, tmp_path: Path) -> None:
    mod = imported(keras_classifier(opset), tmp_path)
    assert "relax.clip" in operators_of(mod)
    assert not [func for func in mod.functions.values() if isinstance(func, tvm.tirx.PrimFunc)]


WAYS = [
    {"mode": "nearest", "nearest_mode": "ceil", "coordinate_transformation_mode": "half_pixel"},
    {"mode": "nearest", "nearest_mode": "round_prefer_floor", "coordinate_transformation_mode": "align_corners"},
    {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    {"mode": "linear", "coordinate_transformation_mode": "half_pixel", "antialias": 1},
    {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS, ids=lambda how: "-".join(map(str, how.values())))
def test_every_way_of_resizing(how: dict[str, Any], tmp_path: Path) -> None:
    at = Writer(18, [1, 3, 8, 10])
    x = at("Resize", "x", "", [1.0, 1.0, 1.7, 0.55], **how)
    if "antialias" not in how:
        x = at("Resize", x, "", "", np.array([1, 3, 9, 20]), **how)
    imported(at.model(at("Relu", x), 4), tmp_path)


OTHERS: dict[str, Callable[[Writer], str]] = {
    "Celu": lambda at: at("Celu", "x", alpha=1.5),
    "Clip": lambda at: at("Clip", "x", "", np.float32(0.3)),
    "Div": lambda at: at("Cast", at("Div", at("Cast", at("Mul", "x", [9.0]), to=INT32), np.int32(-4)), to=FLOAT),
    "GridSample": lambda at: at(
        "GridSample",
        at("GridSample", "x", 2 * at.weight(1, 6, 5, 2), mode="bicubic", padding_mode="reflection"),
        at("Transpose", at("Tanh", at.part("x", 0, 2, 1)), perm=[0, 2, 3, 1]),
        mode="bicubic",
        align_corners=1,
    ),
    "LpNormalization": lambda at: at("Add", at("LpNormalization", "x", axis=1, p=1), at("LpNormalization", "x")),
    "Pow": lambda at: at("Add", at("Pow", "x", [2.0]), at("Mul", at("Pow", "x", np.float32(3)), at("Pow", [1.5], "x"))),
}


def _recurrent(at: Writer, op: str, gates: int, outputs: int, directions: int = 1, **how: Any) -> str:
    """On three rows as steps, with all of its outputs joined."""
    x = at.part(at("Transpose", at("Squeeze", at("Gather", "x", [0], axis=1), [1]), perm=[1, 0, 2]), 0, 3)
    weights = at.weight(directions, gates * 4, 8), at.weight(directions, gates * 4, 4), at.weight(directions, gates * 8)
    found = at(op, x, *weights, *how.pop("others", ()), outputs=outputs, hidden_size=4, **how)
    return at("Concat", *(at("Reshape", each, [1, 1, 1, -1]) for each in found), axis=3)


LENGTHS = np.array([2], "int32")
OTHERS |= {
    "GRU": lambda at: _recurrent(at, "GRU", 3, 2),
    "GRU of two ways": lambda at: _recurrent(
        at, "GRU", 3, 2, 2, direction="bidirectional", linear_before_reset=1, others=[LENGTHS]
    ),
    "LSTM": lambda at: _recurrent(at, "LSTM", 4, 3, direction="reverse", clip=0.7),
    "LSTM of two ways": lambda at: _recurrent(
        at,
        "LSTM",
        4,
        3,
        2,
        direction="bidirectional",
        others=[LENGTHS, at.weight(2, 1, 4), at.weight(2, 1, 4), at.weight(2, 12)],
    ),
    "LSTM with coupled gates": lambda at: _recurrent(at, "LSTM", 4, 3, input_forget=1),
    "RNN": lambda at: _recurrent(at, "RNN", 1, 2, activations=["Relu"]),
    "RNN of other functions": lambda at: at(
        "Concat",
        *(
            _recurrent(at, "RNN", 1, 2, activations=[name], activation_alpha=[0.4], activation_beta=[0.3])
            for name in ("Affine", "Elu", "ScaledTanh", "ThresholdedRelu")
        ),
        _recurrent(
            at,
            "GRU",
            3,
            2,
            2,
            direction="bidirectional",
            activations=["HardSigmoid", "Softsign", "Sigmoid", "LeakyRelu"],
            activation_alpha=[0.3, 0.2],
            activation_beta=[0.4],
        ),
        axis=3,
    ),
    "Hardmax": lambda at: at("Hardmax", "x", axis=2),
    "MaxPool": lambda at: at(
        "Cast", at("MaxPool", "x", outputs=2, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0])[1], to=FLOAT
    ),
    "OneHot": lambda at: at(
        "OneHot", at("Sub", at("ArgMax", at.squeeze("x", 0), axis=1, keepdims=0), np.int64(4)), [8], [0.5, 2.0], axis=0
    ),
    "ReverseSequence": lambda at: at(
        "ReverseSequence", at("Reshape", "x", [8, 4, 2, 3]), np.array([2, 8, 1, 5]), time_axis=0, batch_axis=1
    ),
    "TopK": lambda at: at("TopK", at("Sqrt", "x"), [3], outputs=2, axis=2)[0],
    "TopK places": lambda at: at("Cast", at("TopK", "x", [2], outputs=2, largest=0)[1], to=FLOAT),
}


def _part_of_picture(at: Writer, how: str) -> str:
    """Half of what is read lies beside it."""
    part, mode = np.array([0, 0, 0.1, 0.2, 1, 1, 0.9, 1.4], "float32"), "tf_crop_and_resize"
    return at(
        "Resize",
        "x",
        part,
        [1.0, 1.0, 1.5, 2.0],
        mode=how,
        coordinate_transformation_mode=mode,
        extrapolation_value=0.5,
    )


def _in_one_row(at: Writer, values: Sequence[str]) -> str:
    return at("Concat", *(at("Reshape", each, [1, 1, 1, -1]) for each in values), axis=3)


OTHERS |= {
    "LayerNormalization": lambda at: _in_one_row(
        at, at("LayerNormalization", "x", at.weight(8, 8), at.weight(8, 8), outputs=3, axis=2)
    ),
    "Resize of a part": lambda at: _part_of_picture(at, "linear"),
    "Resize of a part to the nearest": lambda at: _part_of_picture(at, "nearest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_compute_what_onnxruntime_does(name: str, tmp_path: Path) -> None:
    at = Writer(17, [1, 3, 8, 8])
    imported(at.model(OTHERS[name](at), 4), tmp_path)


MOVED: dict[str, Callable[[Writer], str]] = {
    "as it is": lambda at: at("DeformConv", "x", at.weight(6, 4, 3, 3), 3 * at.weight(2, 18, 5, 6)),
    "in groups": lambda at: at(
        "DeformConv",
        "x",
        at.weight(6, 2, 3, 2),
        at("Conv", "x", 3 * at.weight(24, 4, 3, 3), strides=[2, 3], pads=[1, 0, 1, 1]),
        at.weight(6),
        at("Sigmoid", at("Conv", "x", at.weight(12, 4, 3, 3), strides=[2, 3], pads=[1, 0, 1, 1])),
        group=2,
        offset_group=2,
        strides=[2, 3],
        dilations=[1, 2],
        pads=[2, 0, 1, 1],
    ),
}


@pytest.mark.parametrize("how", MOVED)
def test_a_convolution_whose_taps_are_moved(how: str, tmp_path: Path) -> None:
    at = Writer(19, [2, 4, 7, 8])
    imported(at.model(MOVED[how](at), 4), tmp_path)


def _stored(at: Writer, x: str, scale: float, zero: int) -> str:
    return at("QuantizeLinear", x, np.float32(scale), np.uint8(zero))


def _read(at: Writer, x: str, scale: float, zero: int) -> str:
    return at("DequantizeLinear", x, np.float32(scale), np.uint8(zero))


def _bytes(at: Writer, *shape: int) -> np.ndarray:
    return at.random.randint(-100, 100, shape).astype("int8")


def _of_stored(op: str, *middle: Any, scale: float = 0.1, **how: Any) -> Callable[[Writer], str]:
    """Of what was stored by one scale and zero, with what is stored by another."""

    def written(at: Writer) -> str:
        given = (_stored(at, "x", 0.05, 120), np.float32(0.05), np.uint8(120))
        rest = [each(at) if callable(each) else each for each in middle]
        return _read(at, at(op, *given, *rest, np.float32(scale), np.uint8(130), **how), scale, 130)

    return written


def _quantized_layers(at: Writer) -> str:
    """As onnxruntime's quantizer writes them: what is between two layers is stored and read."""
    scales = (np.abs(at.weight(4)) + 0.2) / 100
    weight = at("DequantizeLinear", _bytes(at, 4, 3, 3, 3), scales, np.zeros(4, "int8"), axis=0)
    bias = at("DequantizeLinear", np.array([90, -50, 7, 0], "int32"), 0.05 * scales, np.zeros(4, "int32"), axis=0)
    x = at("Relu", at("Conv", _read(at, _stored(at, "x", 0.05, 128), 0.05, 128), weight, bias, pads=[1, 1, 1, 1]))
    x = _read(at, _stored(at, x, 0.03, 0), 0.03, 0)
    return _read(at, _stored(at, at("Mul", x, x), 0.1, 3), 0.1, 3)


def _dynamically(at: Writer, op: str, weight: np.ndarray, **how: Any) -> str:
    stored, scale, zero = at("DynamicQuantizeLinear", "x", outputs=3)
    total = at(op, stored, weight, zero, np.int8(3), **how)
    return at("Mul", at("Cast", total, to=FLOAT), at("Mul", scale, np.float32(0.01)))


MICROSOFT = {"domain": "com.microsoft"}
QUANTIZED: dict[str, Callable[[Writer], str]] = {
    "ConvInteger": lambda at: _dynamically(at, "ConvInteger", _bytes(at, 4, 3, 3, 3), strides=[2, 1]),
    "DynamicQuantizeMatMul": lambda at: at(
        "DynamicQuantizeMatMul", "x", _bytes(at, 8, 5), np.float32(0.01), np.int8(0), at.weight(5), **MICROSOFT
    ),
    "MatMulInteger": lambda at: _dynamically(at, "MatMulInteger", _bytes(at, 8, 5)),
    "MatMulIntegerToFloat": lambda at: at(
        "MatMulIntegerToFloat",
        _stored(at, "x", 0.05, 120),
        _bytes(at, 8, 5),
        np.float32(0.05),
        np.abs(at.weight(5)),
        np.uint8(120),
        at("QuantizeLinear", at.weight(5), np.float32(0.1), np.int8(0)),
        at.weight(5),
        **MICROSOFT,
    ),
    "QGemm": lambda at: at(
        "Reshape",
        at(
            "QGemm",
            at("Reshape", _stored(at, "x", 0.05, 120), [24, 8]),
            np.float32(0.05),
            np.uint8(120),
            _bytes(at, 5, 8),
            np.float32(0.02),
            np.int8(0),
            np.arange(5, dtype="int32"),
            transB=1,
            **MICROSOFT,
        ),
        [1, 1, 24, 5],
    ),
    "QLinearAdd": _of_stored(
        "QLinearAdd", lambda at: _stored(at, "x", 0.13, 9), 0.13, np.uint8(9), scale=0.0937, **MICROSOFT
    ),
    "QLinearConcat": lambda at: _read(
        at,
        at(
            *("QLinearConcat", np.float32(0.04), np.uint8(100)),
            *(_stored(at, "x", 0.05, 128), np.float32(0.05), np.uint8(128)),
            *(_stored(at, "x", 0.01, 3), np.float32(0.01), np.uint8(3)),
            axis=1,
            **MICROSOFT,
        ),
        0.04,
        100,
    ),
    "QLinearConv": _of_stored(
        "QLinearConv", lambda at: _bytes(at, 4, 3, 3, 3), lambda at: np.abs(at.weight(4)) / 50, np.zeros(4, "int8")
    ),
    "QLinearGlobalAveragePool": _of_stored("QLinearGlobalAveragePool", scale=0.004, **MICROSOFT),
    "QLinearLeakyRelu": _of_stored("QLinearLeakyRelu", scale=0.03, alpha=0.3, **MICROSOFT),
    "QLinearMatMul": _of_stored("QLinearMatMul", lambda at: _bytes(at, 8, 5), 0.01, np.int8(0)),
    "QLinearMul": _of_stored(
        "QLinearMul", lambda at: _stored(at, "x", 0.13, 9), 0.13, np.uint8(9), scale=0.0937, **MICROSOFT
    ),
    "QLinearSigmoid": _of_stored("QLinearSigmoid", scale=0.004, **MICROSOFT),
    "layers": _quantized_layers,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZED)
def test_whole_numbers_of_few_bits_stand_for_the_same(name: str, tmp_path: Path) -> None:
    at = Writer(17, [1, 3, 8, 8])
    path = tmp_path / "model.onnx"
    onnx.save(at.model(QUANTIZED[name](at), 4), path)
    source = open_model(str(path))
    inputs = [np.random.RandomState(7).standard_normal((1, 3, 8, 8)).astype("float32")]
    (expected,) = source.original(*inputs)
    assert len(np.unique(expected)) > 2
    np.testing.assert_allclose(evaluate(import_model(source), inputs)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_quantized_layers_are_built(tmp_path: Path) -> None:
    at = Writer(17, [1, 3, 8, 8])
    onnx.save(at.model(at("Relu", _dynamically(at, "MatMulInteger", _bytes(at, 8, 5))), 4), tmp_path / "few.onnx")
    made = build(BuildOptions(str(tmp_path / "few.onnx"), out=tmp_path / "out"), lambda _line: None)
    assert made.manifest["verification"]["max_rel_error"] < 1e-6


def _of_bytes(at: Writer, layers: int, beside: bool) -> str:
    """Convolutions that see so much that some of their results lie on the border between two bytes."""
    x = _read(at, _stored(at, "x", 0.05, 128), 0.05, 128)
    for _ in range(layers):
        scales, values = (np.abs(at.weight(64)) + 0.2) / 2500, at.random.randint(-127, 128, (64, 64, 3, 3))
        weight = at("DequantizeLinear", values.astype("int8"), scales, np.zeros(64, "int8"), axis=0)
        seen = _read(at, _stored(at, at("Conv", x, weight, pads=[1, 1, 1, 1]), 0.02, 128), 0.02, 128)
        x = _read(at, _stored(at, at("Add", seen, x), 0.03, 128), 0.03, 128) if beside else seen
    return x


@pytest.mark.slow
def test_sums_of_whole_numbers_are_exact(tmp_path: Path) -> None:
    """A number that is stored otherwise turns others: after three layers all answers are the same, or many are not."""
    at = Writer(17, [1, 64, 24, 24])
    onnx.save(at.model(_of_bytes(at, 3, beside=False), 4), tmp_path / "bytes.onnx")
    made = build(BuildOptions(str(tmp_path / "bytes.onnx"), out=tmp_path), lambda _line: None)
    proof = made.manifest["verification"]
    assert proof["max_abs_error"] == 0 < 0.001 < proof["original_moves"] == proof["tolerance"]
    assert verify(made.artifact)["tolerance"] == proof["tolerance"]


@pytest.mark.slow
def test_a_model_of_bytes_may_move_as_far_as_its_original_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Writer(17, [1, 64, 24, 24])
    onnx.save(at.model(_of_bytes(at, 4, beside=True), 4), tmp_path / "bytes.onnx")
    source = open_model(str(tmp_path / "bytes.onnx"))
    inputs = drawn(source.inputs, np.random.RandomState(0))
    moves = source.moves(inputs, 1e-4)
    assert 0.001 < moves < 0.1 and moves == source.moves(inputs, 1e-4)
    assert source.moves(inputs, 0.0) == 0 and source.moves(inputs, 1.0) == 0  # as far as that proves nothing

    def imports(by: float) -> None:
        monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path / str(by)))
        monkeypatch.setattr(gate, "evaluate", lambda _mod, given: [y * (1 + by) for y in source.original(*given)])
        import_model(open_model(str(tmp_path / "bytes.onnx")))

    imports(0.9 * moves)
    with pytest.raises(ParityError, match="it stores numbers in few bits"):
        imports(1.1 * moves)


def test_what_stores_nothing_in_few_bits_does_not_move() -> None:
    source = open_model("saevit_micro", image_size=32)
    assert source.moves(source.zeros(), 1e-4) == source.moves((np.ones(source.input_shape, "float32"),), 0.1) == 0


def _tokens(at: Writer, op: str, *rest: Any, outputs: int = 1, **how: Any) -> Any:
    return at(op, at("Reshape", "x", [1, 24, 8]), *rest, outputs=outputs, **how, **MICROSOFT)


FUSED: dict[str, Callable[[Writer], str]] = {
    "FusedConv": lambda at: at(
        "FusedConv",
        *("x", at.weight(4, 3, 3, 3), at.weight(4), at.weight(1, 4, 6, 6)),
        activation="HardSigmoid",
        activation_params=[0.3, 0.4],
        **MICROSOFT,
    ),
    "FusedConv of LeakyRelu": lambda at: at(
        "FusedConv", "x", at.weight(4, 3, 3, 3), activation="LeakyRelu", activation_params=[0.1], **MICROSOFT
    ),
    "FusedGemm": lambda at: at(
        "FusedGemm",
        *(at("Reshape", "x", [24, 8]), at.weight(8, 5), at.weight(5)),
        activation="Tanh",
        alpha=0.5,
        **MICROSOFT,
    ),
    "FusedMatMul": lambda at: at("FusedMatMul", "x", at.weight(5, 8), alpha=0.5, transA=1, transB=1, **MICROSOFT),
    "MultiHeadAttention": lambda at: _tokens(
        at, "MultiHeadAttention", at.weight(1, 9, 8), at.weight(1, 9, 8), at.weight(24), num_heads=2
    ),
    "QuickGelu": lambda at: at("QuickGelu", "x", alpha=1.5, **MICROSOFT),
    "SkipLayerNormalization": lambda at: at(
        "Add",
        *_tokens(at, "SkipLayerNormalization", at.weight(1, 24, 8), at.weight(8), outputs=4, epsilon=1e-3)[::3],
    ),
    "SimplifiedLayerNormalization": lambda at: at("SimplifiedLayerNormalization", "x", at.weight(8), epsilon=1e-3),
    "SkipSimplifiedLayerNormalization": lambda at: _tokens(
        at, "SkipSimplifiedLayerNormalization", at.weight(1, 24, 8), at.weight(8), at.weight(8), epsilon=1e-3
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_onnxruntime_has_fused_is_computed(name: str, tmp_path: Path) -> None:
    at = Writer(17, [1, 3, 8, 8])
    imported(
        at.model(FUSED[name](at), {"FusedGemm": 2}.get(name, 3 if "Head" in name or "Skip" in name else 4)), tmp_path
    )


ATTENTION: dict[str, Callable[[Writer], str]] = {
    "heads in a row": lambda at: at(
        "Attention",
        at("Reshape", "x", [1, 24, 8]),
        *(at.weight(1, 9, 4), at.weight(1, 9, 4), at("Greater", at.weight(24, 9), [-0.1])),
        q_num_heads=4,
        kv_num_heads=2,
    ),
    "with a mask and a cap": lambda at: at(
        "Attention", "x", "x", "x", at.weight(8, 8), is_causal=1, scale=0.7, softcap=1.5
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_new_opsets(name: str, tmp_path: Path) -> None:
    at = Writer(23, [1, 3, 8, 8])
    imported(at.model(ATTENTION[name](at), 3 if "row" in name else 4), tmp_path)


def test_functions_that_onnxruntime_writes_out_have_known_shapes(tmp_path: Path) -> None:
    at = Writer(21, [1, 4, 8, 8])
    imported(at.model(at("GroupNormalization", "x", at.weight(4), at.weight(4), num_groups=2), 4), tmp_path)


def test_an_operator_that_cannot_be_computed_is_named(tmp_path: Path) -> None:
    at = Writer(17, [1, 3, 8, 8])
    whole = at("ReduceMean", at("Cast", at("Mul", "x", [9.0]), to=INT32), axes=[1])
    with pytest.raises(
        CompileError, match=r"^TVM cannot compute 'relax.mean' as this model has it: .*replace that part"
    ):
        imported(at.model(at("Cast", whole, to=FLOAT), 4), tmp_path)


@pytest.mark.parametrize(
    ("op", "rank", "more", "said"),
    [
        ("Unique", 1, {}, r"'Unique' \(node 'Unique0_0'\): how many values it gives depends on the picture"),
        ("Compress", 1, {}, r"'Compress' \(node 'Compress0_0'\): how many values it gives depends on the picture"),
        ("Resize", 4, {"mode": "cubic", "keep_aspect_ratio_policy": "not_larger"}, "keeps the proportions has no rule"),
    ],
)
def test_what_cannot_be_is_one_sentence(op: str, rank: int, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    at = Writer(18, [1, 3, 8, 8])
    rest = {"Compress": [np.ones(192, bool)], "Resize": ["", "", np.array([1, 3, 9, 20])]}.get(op, [])
    with pytest.raises(CompileError, match=rf"^TVM cannot import .*{said}.*replace that part of the model and try"):
        imported(at.model(at(op, "x", *rest, **more), rank), tmp_path)


def test_what_onnxruntime_laid_out_for_one_cpu_is_refused(tmp_path: Path) -> None:
    at = Writer(17, [1, 16, 8, 8])
    blocks = {"domain": "com.microsoft.nchwc"}
    x = at("Conv", at("ReorderInput", "x", **blocks), at.weight(16, 16, 1, 1), **blocks)
    with pytest.raises(CompileError, match="for the vectors of one CPU: give the file that it was made from"):
        imported(at.model(at("ReorderOutput", x, channels=16, **blocks), 4), tmp_path)


def test_inputs_that_have_to_be_of_certain_values_are_one_sentence(tmp_path: Path) -> None:
    """The number of a picture, say."""
    inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in (("x", [1, 3, 8, 8]), ("y", [9, 5]))]
    node = helper.make_node("MaxRoiPool", ["x", "y"], ["z"], pooled_shape=[2, 2])
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("z", FLOAT, [9, 3, 2, 2])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(
        ModelError, match=r"' does not run on every input \(.*\), so nothing can be compared with it: let"
    ):
        imported(model, tmp_path)


def test_a_quantized_model_that_rounding_turns_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm.relax.frontend.onnx import onnx_frontend

    wrong = classmethod(lambda cls, bb, inputs, attr, params: relax.op.sigmoid(inputs[0]))
    monkeypatch.setattr(onnx_frontend.Tanh, "_impl_v7", wrong)
    at = Writer(17, [1, 3, 8, 8])
    with pytest.raises(
        ParityError, match=r"Nothing was built: it stores numbers in few bits, .* that was not quantized"
    ):
        imported(at.model(at("Tanh", _read(at, _stored(at, "x", 0.1, 9), 0.1, 9)), 4), tmp_path)


def test_operators_without_a_rule_are_all_named_with_their_nodes(tmp_path: Path) -> None:
    at = Writer(17, [1, 3, 8, 8])
    x = at("Det", at("Mul", "x", at("RandomUniformLike", "x")))
    with pytest.raises(
        CompileError,
        match=r"without a rule: Det \(node 'Det\d_0'\), RandomUniformLike \(node 'RandomUniformLike\d_0'\); replace",
    ):
        imported(at.model(x, 2), tmp_path)


class Tokens(nn.Module):
    """A transformer in small: what its shapes are, its exporter asks of the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1)
        return self.block(x)[:, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_the_older_exporter_of_pytorch_writes_is_built(tmp_path: Path) -> None:
    path = tmp_path / "tokens.onnx"
    torch.onnx.export(
        Tokens().eval(),
        (torch.zeros(1, 3, 32, 32),),
        path,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
    )
    made = build(BuildOptions(str(path), batch=2, out=tmp_path / "out"), lambda _line: None)
    assert 0 < made.manifest["verification"]["max_rel_error"] < 2e-5


@pytest.mark.slow
def test_recurrent_layers_and_orders_are_built(tmp_path: Path) -> None:
    """Through all phases: TVM's change of layouts has no place for some of what an import may write."""
    at = Writer(17, [1, 3, 8, 8])
    largest = at("Reshape", at("TopK", "x", [3], outputs=2, axis=2)[0], [1, 1, 1, -1])
    x = at("Concat", _recurrent(at, "LSTM", 4, 3, 2, direction="bidirectional"), largest, axis=3)
    onnx.save(at.model(x, 4), tmp_path / "steps.onnx")
    made = build(BuildOptions(str(tmp_path / "steps.onnx"), out=tmp_path / "out"), lambda _line: None)
    assert 0 < made.manifest["verification"]["max_rel_error"] < 2e-5
