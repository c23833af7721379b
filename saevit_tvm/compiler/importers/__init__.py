"""A model, wherever it came from, as a Relax module with its weights bound as constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm

from saevit_tvm.compiler.importers import onnx, torch

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def import_model(source: ModelSource) -> tvm.IRModule:
    """One function `main`: the image in, the outputs out."""
    return torch.import_exported(source) if source.onnx is None else onnx.import_onnx(source)
