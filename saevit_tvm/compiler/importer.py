"""A model, wherever it came from, as a Relax module with its weights bound as constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm

from saevit_tvm.errors import CompileError

if TYPE_CHECKING:
    from saevit_tvm.models.sources import ModelSource


def import_model(source: ModelSource) -> tvm.IRModule:
    """One function `main`: the image in, the outputs out."""
    if source.onnx is not None:
        return _from_onnx(source)
    from tvm.relax.frontend.torch import from_exported_program

    exported = source.exported()
    missing = unsupported_operators(exported)
    if missing:
        raise CompileError(
            f"{source.name} uses operators that TVM cannot import: {', '.join(missing)}; "
            "replace them in the model and try again."
        )
    # Decomposition stays on: without it batch_norm's momentum is read as its epsilon, silently.
    return from_exported_program(exported, keep_params_as_input=False, unwrap_unit_return_tuple=True)


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
    except Exception as error:  # the importer raises whatever its converters happen to raise
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CompileError(f"{source.name} cannot be imported by TVM: {reason}") from error
    return tvm.relax.transform.DecomposeOpsForInference()(mod)
