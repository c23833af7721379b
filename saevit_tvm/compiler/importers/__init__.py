"""A model, wherever it came from, as a Relax module with its weights bound as constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm

from saevit_tvm.support.errors import CompileError

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def import_model(source: ModelSource) -> tvm.IRModule:
    """One function `main`: the image in, the outputs out."""
    if source.onnx is not None:
        return _from_onnx(source)
    from tvm.relax.frontend.torch import from_exported_program

    exported = source.exported()
    try:
        # Decomposition stays on: without it batch_norm's momentum is read as its epsilon, silently.
        return from_exported_program(exported, keep_params_as_input=False, unwrap_unit_return_tuple=True)
    except Exception as error:  # the importer's converters raise whatever they happen to raise
        missing = unsupported_operators(exported)
        reason = f"it uses operators without a rule: {', '.join(missing)}" if missing else _last_line(error)
        raise CompileError(
            f"TVM cannot import {source.name}: {reason}; replace that part of the model and try again."
        ) from error


def unsupported_operators(exported: Any) -> list[str]:
    """Every operator of the decomposed program that TVM's importer has no rule for, all at once."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    known = ExportedProgramImporter().create_convert_map()
    used = {
        node.target.__name__
        for node in exported.run_decompositions().graph.nodes
        if node.op == "call_function" and hasattr(node.target, "_schema")
    }
    return sorted(used - set(known))


def _from_onnx(source: ModelSource) -> tvm.IRModule:
    from tvm.relax.frontend.onnx import from_onnx

    try:
        mod = from_onnx(source.onnx, keep_params_in_input=False)
    except Exception as error:
        raise CompileError(f"TVM cannot import {source.name}: {_last_line(error)}") from error
    return tvm.relax.transform.DecomposeOpsForInference()(mod)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
