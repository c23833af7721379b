"""Where a constant is not zero: how PyTorch wrote a range before ONNX had one."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, known

OPERATORS = ("NonZero",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    x = known(inputs[0])
    if x is None:
        raise ValueError("how many numbers are not zero depends on the picture")
    return relax.const(np.stack(np.nonzero(x)), "int64")
