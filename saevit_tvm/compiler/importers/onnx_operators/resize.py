"""Resizing in every way that ONNX knows; TVM rounds otherwise, and takes no empty input for one that is not there.

Each way is linear along each axis. So onnxruntime itself says, by resizing the unit matrix, which numbers of a line
make up a number of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.lines import mixed
from saevit_tvm.compiler.importers.node import Emitter, dtype, known, shape
from saevit_tvm.models.onnx_session import exact_session

OPERATORS = ("Resize",)
LEFT_OUT = ("axes", "extrapolation_value", "tvm_custom")  # of the attributes, where one axis is resized


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    x = inputs[0]
    given = [None if each is None else known(each) for each in (inputs[2], inputs[3])]
    scales, sizes = (None if each is None or each.size == 0 else each for each in given)
    if scales is None and sizes is None:
        raise ValueError("a size that depends on the picture is not known when the library is made")
    crops = attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize"
    part = known(inputs[1]) if crops and inputs[1] is not None else None
    if crops and part is None:
        raise ValueError("a part that depends on the picture has no rule")
    if attributes.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise ValueError("a resize that keeps the proportions has no rule")
    axes = [axis % len(shape(x)) for axis in attributes.get("axes", range(len(shape(x))))]
    how = {name: value for name, value in attributes.items() if name not in LEFT_OUT}
    beside = np.zeros([1] * len(shape(x)), dtype=bool)
    for which, axis in enumerate(axes):
        length = shape(x)[axis]
        cut = None if part is None else part.reshape(2, -1)[:, which]
        shares = _shares(length, scales, sizes, which, cut, how, op.importer.opset)
        if shares.shape != (length, length) or not np.array_equal(shares, np.eye(length)):
            x = mixed(op, x, axis, shares)
        if crops:  # what has no share in the picture lies beside it, in all of a line
            beside = beside | ~shares.any(1).reshape([-1 if at == axis else 1 for at in range(beside.ndim)])
    if not beside.any():
        return x
    return op.where(relax.const(beside), relax.const(attributes.get("extrapolation_value", 0.0), dtype(x)), x)


def _shares(length: int, scales: Any, sizes: Any, which: int, cut: Any, how: dict[str, Any], opset: int) -> np.ndarray:
    """[numbers of the result, numbers of a line] along one axis; of `cut` the line's begin and end."""
    import onnx

    helper, kinds = onnx.helper, onnx.TensorProto
    lines = np.eye(length, dtype=np.float32).reshape(1, length, length, 1)
    if sizes is None:
        extent = helper.make_tensor("scales", kinds.FLOAT, [4], [1, 1, float(scales[which]), 1])
    else:
        extent = helper.make_tensor("sizes", kinds.INT64, [4], [1, length, int(sizes[which]), 1])
    begin, end = (0, 1) if cut is None else map(float, cut)
    cuts = helper.make_tensor("cut", kinds.FLOAT, [8], [0, 0, begin, 0, 1, 1, end, 1])
    names = ["lines", "cut", *(["scales"] if sizes is None else ["", "sizes"])]
    given = helper.make_tensor_value_info("lines", kinds.FLOAT, lines.shape)
    result = helper.make_tensor_value_info("resized", kinds.FLOAT, [1, length, None, 1])
    graph = helper.make_graph(
        [helper.make_node("Resize", names, ["resized"], **how)], "g", [given], [result], [extent, cuts]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return exact_session(model).run(None, {"lines": lines})[0][0, :, :, 0].T
