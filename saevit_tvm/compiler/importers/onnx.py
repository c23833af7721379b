"""ONNX files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tvm

from saevit_tvm.compiler.importers.errors import reason
from saevit_tvm.support.errors import CompileError

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def import_onnx(source: ModelSource) -> tvm.IRModule:
    from tvm.relax.frontend.onnx import from_onnx

    try:
        mod = from_onnx(source.onnx, keep_params_in_input=False)
    except Exception as error:
        raise CompileError(f"TVM cannot import {source.name}: {reason(error)}") from error
    return tvm.relax.transform.DecomposeOpsForInference()(mod)
