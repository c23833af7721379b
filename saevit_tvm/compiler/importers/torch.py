"""Programs of torch.export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm

from saevit_tvm.compiler.importers.errors import reason
from saevit_tvm.compiler.importers.operators import converters
from saevit_tvm.support.errors import CompileError

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def import_exported(source: ModelSource) -> tvm.IRModule:
    from tvm.relax.frontend.torch import from_exported_program

    exported = source.exported()
    try:
        # Decomposition stays on: without it batch_norm's momentum is read as its epsilon, silently.
        return from_exported_program(
            exported,
            keep_params_as_input=False,
            unwrap_unit_return_tuple=True,
            custom_convert_map=converters(),
        )
    except Exception as error:  # the importer's converters raise whatever they happen to raise
        missing = unsupported_operators(exported)
        why = f"it uses operators without a rule: {', '.join(missing)}" if missing else reason(error)
        raise CompileError(
            f"TVM cannot import {source.name}: {why}; replace that part of the model and try again."
        ) from error


def unsupported_operators(exported: Any) -> list[str]:
    """Every operator of the decomposed program that TVM's importer has no rule for, all at once."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    known = ExportedProgramImporter().create_convert_map() | converters()
    used = {
        node.target.__name__
        for node in exported.run_decompositions().graph.nodes
        if node.op == "call_function" and hasattr(node.target, "_schema")
    }
    return sorted(used - set(known))
