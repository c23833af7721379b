"""Sampling at computed places."""

from __future__ import annotations

from typing import Any

from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter
from saevit_tvm.compiler.importers.sampling import sampled

OPERATORS = ("GridSample",)
METHODS = {b"linear": "bilinear", b"cubic": "bicubic"}  # names of opset 20


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr:
    mode, padding = attributes.get("mode", b"linear"), attributes.get("padding_mode", b"zeros").decode()
    method = METHODS.get(mode, mode.decode())
    return sampled(op, inputs[0], inputs[1], method, padding, bool(attributes.get("align_corners", 0)))
