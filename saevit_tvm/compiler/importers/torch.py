"""Programs of torch.export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from saevit_tvm.compiler.importers import complex_numbers
from saevit_tvm.compiler.importers.errors import reason
from saevit_tvm.compiler.importers.folding import folded
from saevit_tvm.compiler.importers.gate import Imported, Step
from saevit_tvm.compiler.importers.operators import converters
from saevit_tvm.compiler.importers.prepare import prepared
from saevit_tvm.runtime.tensors import Inputs
from saevit_tvm.support.errors import CompileError

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def import_exported(source: ModelSource) -> Imported:
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    program, importer = prepared(source.exported()), ExportedProgramImporter()
    if missing := _unsupported(program):
        raise CompileError(
            f"TVM cannot import {source.name}: it uses operators without a rule: {', '.join(missing)}; "
            "replace that part of the model and try again."
        )
    try:
        mod = importer.from_exported_program(
            program,
            keep_params_as_input=False,
            unwrap_unit_return_tuple=True,
            no_bind_return_tuple=False,
            custom_convert_map=converters(),
        )
    except Exception as error:  # the importer's converters raise whatever they happen to raise
        raise CompileError(
            f"TVM cannot import {source.name}: {reason(error)}; replace that part of the model and try again."
        ) from error
    return Imported(folded(mod), partial(_steps, program, importer.env))


def _unsupported(program: Any) -> list[str]:
    """Every operator that there is no rule for, all at once, each with where it stands in the model's source."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    known = ExportedProgramImporter().create_convert_map() | converters()
    missing: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            name, is_complex = node.target.__name__, complex_numbers.is_complex(node)
            if complex_numbers.lacks_rule(node) if is_complex else name not in known:
                missing.setdefault(f"{name} of complex numbers" if is_complex else name, place(node))
    return [f"{name}{missing[name]}" for name in sorted(missing)]


def place(node: Any) -> str:
    """Where a node comes from in the model's source, as far as torch.export kept it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in frames if "/torch/" not in file]
    return " ({}:{})".format(*own[-1]) if own else ""


def _steps(program: Any, env: dict[Any, Any], inputs: Inputs) -> Iterator[Step]:
    """PyTorch's own values of every node that became a variable."""
    values = _Values(program.graph_module)
    given = [node.meta.get("constant") for node in program.graph.nodes if node.op == "placeholder"]
    own = iter(inputs)
    with torch.no_grad():
        values.run(*(torch.from_numpy(next(own)) if each is None else each for each in given))
    for node, value in values.found.items():
        variable = getattr(env.get(node), "name", None)
        if variable is not None and isinstance(value, torch.Tensor):
            yield Step(getattr(node.target, "__name__", node.name), place(node), variable, value.resolve_neg().numpy())


class _Values(torch.fx.Interpreter):
    """Keeps what every call gives."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[torch.fx.Node, Any] = {}

    def run_node(self, node: torch.fx.Node) -> Any:
        value = super().run_node(node)
        if node.op == "call_function":
            self.found[node] = value
        return value
