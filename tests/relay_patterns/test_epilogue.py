"""Activations as graphs write them: that each way is found, and that it is what PyTorch computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import tvm
from onnx import TensorProto, helper

from relay_patterns import Reading, find_primitives
from saevit_tvm.compiler import street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.models.opening import open_graph
from schedules.activations import ACTIVATIONS, GraphValue, Numpy

PYTORCH = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky": F.leaky_relu,
    "clip": F.hardtanh,
}
OPERATORS = {
    "nn.relu": F.relu,
    "nn.gelu": F.gelu,
    "nn.silu": F.silu,
    "nn.gelu_tanh": PYTORCH["gelu_tanh"],
    "nn.leakyrelu": lambda x, alpha: F.leaky_relu(x, alpha),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "greater": lambda x, other: x > other,
    "power": lambda x, other: x**other,
    **{name: getattr(torch, name) for name in ("abs", "negative", "log", "where")},
}


class Graphs(Numpy):
    """Numbers, with the operators of graphs."""

    def operator(self, name: str, operands: list[Any], attrs: dict[str, Any]) -> Any:
        tensors = [torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in operands]
        return OPERATORS[name](*tensors, **attrs).numpy()


@pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=lambda row: row.name)
def test_all_ways_to_write_an_activation_are_one(row: Any) -> None:
    x = np.linspace(-9, 9, 181)
    function = PYTORCH.get(row.name) or getattr(F, row.name)
    wanted = function(torch.from_numpy(x)).numpy()
    for form in (row.formula, *row.graphs):
        np.testing.assert_allclose(form(GraphValue(Graphs(), x), *row.numbers).raw, wanted, rtol=1e-9, atol=1e-9)


# Nodes of ONNX, from "a" to "y"; numbers are constants.
ONNX: dict[str, list[tuple[Any, ...]]] = {
    "gelu_tanh, an operator": [("Gelu", "a", "y", {"approximate": "tanh"})],
    "gelu_tanh, from PyTorch": [
        *(("Mul", "a", "a", "b"), ("Mul", "a", "b", "c"), ("Mul", 0.044715, "c", "d"), ("Add", "a", "d", "e")),
        *(("Mul", (2 / np.pi) ** 0.5, "e", "f"), ("Tanh", "f", "g"), ("Add", 1.0, "g", "h"), ("Mul", "a", "h", "i")),
        ("Mul", 0.5, "i", "y"),
    ],
    "gelu_tanh, with a power": [
        *(("Pow", "a", 3.0, "c"), ("Mul", "c", 0.044715, "d"), ("Add", "a", "d", "e")),
        *(("Mul", "e", (2 / np.pi) ** 0.5, "f"), ("Tanh", "f", "g"), ("Add", "g", 1.0, "h")),
        *(("Mul", "a", 0.5, "i"), ("Mul", "i", "h", "y")),
    ],
    "leaky:0.1": [("LeakyRelu", "a", "y", {"alpha": 0.1})],
    "mish, an operator": [("Mish", "a", "y", {})],
    "mish": [("Softplus", "a", "b"), ("Tanh", "b", "c"), ("Mul", "a", "c", "y")],
    "elu": [("Elu", "a", "y", {})],
    "hardswish": [("HardSwish", "a", "y")],
    # Its factor and its offset go into the matrix.
    "bias clip:0.0:1.0": [("HardSigmoid", "a", "y", {})],
    # Twice the same, so that it is no activation.
    "": [("Mul", "a", "a", "b"), ("Mul", "a", "b", "c"), ("Tanh", "c", "d"), ("Mul", "a", "d", "y")],
}


def found(nodes: list[tuple[Any, ...]], first: str = "MatMul", **weights: np.ndarray) -> Reading:
    """The only primitive behind which these nodes are, all of them in one spec."""
    named = dict(weights)
    made = [helper.make_node(first, ["x", *weights], ["a"])]
    for op, *values in nodes:
        attrs = values.pop() if isinstance(values[-1], dict) else {}
        named |= {str(value): np.array(value) for value in values[:-1] if not isinstance(value, str)}
        made.append(helper.make_node(op, [*map(str, values[:-1])], [values[-1]], **attrs))
    ends = (helper.make_tensor_value_info(each, TensorProto.FLOAT, [2, 4]) for each in "xy")
    constants = [onnx.numpy_helper.from_array(each.astype("float32"), name) for name, each in named.items()]
    graph = helper.make_graph(made, "net", *([end] for end in ends), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    mod = import_model(open_graph(model))
    mod = street.run(mod, street.simplify(), tvm.target.Target("llvm"))
    (reading,) = find_primitives(mod["main"], lambda _spec: True).values()
    return reading


@pytest.mark.parametrize("name", ONNX)
def test_activations_of_onnx(name: str) -> None:
    assert " ".join(found(ONNX[name], w=np.eye(4)).spec.epilogue.steps) == name.partition(",")[0]


S, B = np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.25, 1.0, -1.0, 2.0])
AFFINE = [
    *(("Mul", "a", S, "b"), ("Add", "b", B, "c"), ("Mul", 2.0, "c", "d"), ("Add", 1.0, "d", "e")),
    ("Relu", "e", "y"),
]


def test_scales_and_offsets_go_into_weights() -> None:
    linear = found(AFFINE, w=np.eye(4))
    assert linear.spec.epilogue.steps == ("bias", "relu") and [*linear.weights] == ["w", "b"]
    np.testing.assert_allclose(linear.weights["w"], np.diag(2 * S))
    np.testing.assert_allclose(linear.weights["b"], 2 * B + 1)
    norm = found(AFFINE, "LayerNormalization", g=S, o=B)
    assert norm.spec.epilogue.steps == ("relu",) and [*norm.weights] == ["g", "b"]
    np.testing.assert_allclose(norm.weights["g"], 2 * S * S)
    np.testing.assert_allclose(norm.weights["b"], 2 * (B * S + B) + 1)


def test_behind_sums_of_whole_numbers_they_stay_steps() -> None:
    """Scaled weights would be none: of a quantized model the last bit of a sum decides what is stored."""
    linear = found(AFFINE, w=3 * np.eye(4))
    assert "scale" in linear.spec.epilogue.steps
    np.testing.assert_array_equal(linear.weights["w"], 3 * np.eye(4))


def test_behind_an_activation_they_are_steps() -> None:
    nodes = [("Relu", "a", "b"), ("Mul", "b", S, "c"), ("Add", "c", B, "y")]
    linear = found(nodes, w=np.eye(4))
    assert linear.spec.epilogue.steps == ("relu", "scale", "bias") and [*linear.weights] == ["w", "s", "b"]
    norm = found(nodes, "LayerNormalization", g=S, o=B)
    assert norm.spec.epilogue.steps == ("relu", "scale", "bias") and [*norm.weights] == ["g", "b", "s", "bias"]
    for reading, name in ((linear, "b"), (norm, "bias")):
        np.testing.assert_allclose(reading.weights["s"], S)
        np.testing.assert_allclose(reading.weights[name], B)
