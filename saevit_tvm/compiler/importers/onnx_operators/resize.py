"""Resizing in every way that ONNX knows; TVM rounds otherwise, and takes no empty input for one that is not there.

Each way is linear along each axis. So onnxruntime itself says, by resizing the unit matrix, which numbers of a line
make up a number of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.lines import mixed
from saevit_tvm.compiler.importers.node import Emitter, known, shape

OPERATORS = ("Resize",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    x = inputs[0]
    given = [None if each is None else known(each) for each in (inputs[2], inputs[3])]
    scales, sizes = (None if each is None or each.size == 0 else each for each in given)
    if scales is None and sizes is None:
        raise ValueError("a size that depends on the picture is not known when the library is made")
    if attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        raise ValueError("a resize that crops reads beside the picture, which no rule computes")
    if attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise ValueError("a resize that keeps the proportions has no rule")
    axes = [axis % len(shape(x)) for axis in attributes.get("axes", range(len(shape(x))))]
    how = {name: value for name, value in attributes.items() if name not in ("axes", "tvm_custom")}
    for which, axis in enumerate(axes):
        length = shape(x)[axis]
        shares = _shares(length, scales, sizes, which, how, op.importer.opset)
        if shares.shape != (length, length) or not np.array_equal(shares, np.eye(length)):
            x = mixed(op, x, axis, shares)
    return x


def _shares(length: int, scales: Any, sizes: Any, which: int, how: dict[str, Any], opset: int) -> np.ndarray:
    """[numbers of the result, numbers of a line] along one axis."""
    import onnx
    import onnxruntime

    helper, kinds = onnx.helper, onnx.TensorProto
    lines = np.eye(length, dtype=np.float32).reshape(1, length, length, 1)
    if sizes is None:
        extent = helper.make_tensor("scales", kinds.FLOAT, [4], [1, 1, float(scales[which]), 1])
    else:
        extent = helper.make_tensor("sizes", kinds.INT64, [4], [1, length, int(sizes[which]), 1])
    names = ["lines", "", *(["scales"] if sizes is None else ["", "sizes"])]
    given = helper.make_tensor_value_info("lines", kinds.FLOAT, lines.shape)
    result = helper.make_tensor_value_info("resized", kinds.FLOAT, [1, length, None, 1])
    graph = helper.make_graph([helper.make_node("Resize", names, ["resized"], **how)], "g", [given], [result], [extent])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"lines": lines})[0][0, :, :, 0].T
