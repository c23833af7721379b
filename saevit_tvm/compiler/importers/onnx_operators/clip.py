"""Bounds as numbers, which kernels take up, where TVM would write loops."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, known

OPERATORS = ("Clip",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr | None:
    x = inputs[0]
    bounds = [known(each) for each in (inputs[1], inputs[2]) if each is not None]
    if not dtype(x).startswith("float") or any(each is None or math.isnan(each) for each in bounds):
        return None
    low, high = (
        none if bound is None else float(known(bound))
        for bound, none in ((inputs[1], -math.inf), (inputs[2], math.inf))
    )
    return op.clip(x, low, high)
