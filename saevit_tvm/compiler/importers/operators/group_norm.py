"""Group norm, also without factors and offsets."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, arguments, dtype, only_first, shape

OPERATORS = ("native_group_norm.default",)


def convert(node: Any, op: Emitter) -> relax.Expr:
    only_first(node, "the mean or deviation of a group norm")
    given = arguments(node, op)
    x, channels = given["input"], shape(given["input"])[1]
    weight, bias = (
        relax.const(np.full(channels, value), dtype(x)) if given[name] is None else given[name]
        for name, value in (("weight", 1.0), ("bias", 0.0))
    )
    axes = list(range(2, len(shape(x))))
    normal = op.nn.group_norm(
        x, weight, bias, num_groups=given["group"], channel_axis=1, axes=axes, epsilon=given["eps"]
    )
    value = normal
    return op.tuple(value, value, value)
