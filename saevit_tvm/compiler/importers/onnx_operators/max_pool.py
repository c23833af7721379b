"""Max pooling that says where its values stand, counted through the whole tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, shape
from saevit_tvm.compiler.importers.operators.max_pool import places

OPERATORS = ("MaxPool",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr | None:
    x = inputs[0]
    if attributes["tvm_custom"]["num_outputs"] < 2:
        return None
    pads = [*attributes.get("pads", [0, 0, 0, 0])]
    if len(shape(x)) != 4 or attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or attributes.get("storage_order"):
        raise ValueError("where the largest values of this max pool are, no rule computes")
    kernel = list(attributes["kernel_shape"])
    strides, dilations = (list(attributes.get(name, [1, 1])) for name in ("strides", "dilations"))
    value = op.nn.max_pool2d(x, kernel, strides, pads, dilations, bool(attributes.get("ceil_mode", 0)))
    place = places(op, x, shape(value), kernel, strides, pads[:2], dilations)
    pictures, channels, high, wide = shape(x)
    first = np.arange(pictures * channels).reshape(pictures, channels, 1, 1) * (high * wide)
    return op.tuple(value, op.add(place, relax.const(first, "int64")))
