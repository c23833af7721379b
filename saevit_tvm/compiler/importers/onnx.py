"""ONNX files."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from saevit_tvm.compiler.importers.errors import reason
from saevit_tvm.compiler.importers.folding import folded
from saevit_tvm.compiler.importers.gate import Imported, Step
from saevit_tvm.compiler.importers.node import Emitter
from saevit_tvm.compiler.importers.onnx_operators import converters
from saevit_tvm.models.onnx_session import exact_session
from saevit_tvm.runtime.tensors import Inputs
from saevit_tvm.support.errors import CompileError

OPSET = 17  # the oldest that all is converted to
STANDARD = ("", "ai.onnx")  # names of ONNX's own operators
LAID_OUT = "com.microsoft.nchwc"  # that of onnxruntime's, whose channels lie in blocks

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def _importer() -> Any:
    """TVM's, with a variable for what every node gives that depends on the input."""
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, onnx_input

    class Importer(ONNXGraphImporter):
        @property
        def block_builder(self) -> relax.BlockBuilder:
            return self.bb

        def _check_for_unsupported_ops(self, graph: Any) -> None:
            """TVM knows of its own rules only, and names no node."""

        def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> relax.Expr:
            attrs["tvm_custom"]["operator"] = op_name
            rule = converters().get(op_name)
            try:
                value = None if rule is None else rule(inputs, attrs, Emitter(self))
                if value is None:
                    value = super()._convert_operator(op_name, inputs, attrs, opset)
            except Exception as error:  # a rule raises whatever it happens to raise
                where = f"'{op_name}' (node '{attrs['tvm_custom']['name']}')"
                raise ValueError(f"{where}: {reason(error)}") from error
            computed = isinstance(value, relax.Call) and isinstance(value.ty, relax.TensorType)
            return self.bb.emit(value) if computed and any(isinstance(each, relax.Var) for each in inputs) else value

        def by_tvm(self, op_name: str, inputs: Any, attrs: Any) -> relax.Expr:
            """What TVM's own rule gives: a part of what another operator stands for."""
            return self.bb.emit(super()._convert_operator(op_name, onnx_input(inputs), attrs, self.opset))

    return Importer({}, None, keep_params_in_input=False)


def import_onnx(source: ModelSource) -> Imported:
    model = _simplified(_in_new_operators(source.onnx))
    if any(
        node.op_type == "Shape" for node in model.graph.node
    ):  # written out of a function, such as GroupNormalization
        model = _simplified(model)
    if any(node.domain == LAID_OUT for node in model.graph.node):
        raise CompileError(
            f"onnxruntime has optimised {source.name} for the vectors of one CPU: give the file that it was made from, "
            "or one that is optimised no further than ORT_ENABLE_EXTENDED."
        )
    if missing := _unsupported(model.graph):
        raise CompileError(
            f"TVM cannot import {source.name}: it uses operators without a rule: {', '.join(missing)}; "
            "replace that part of the model and try again."
        )
    importer = _importer()
    opset = next(each.version for each in model.opset_import if each.domain in STANDARD)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TVM prints what it cannot convert
            mod = relax.transform.FoldConstant()(folded(_with_known_shapes(importer.from_onnx(model.graph, opset))))
    except Exception as error:
        raise CompileError(
            f"TVM cannot import {source.name}: {reason(error)}; replace that part of the model and try again."
        ) from error
    return Imported(mod, partial(_steps, model, importer._nodes))


def _unsupported(graph: Any) -> list[str]:
    """Every operator that there is no rule for, all at once, each with the first node that has it."""
    from tvm.relax.frontend.onnx import onnx_frontend

    known = {*onnx_frontend._get_convert_map(), *converters(), "If"}
    missing: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in known:
            missing.setdefault(node.op_type, f"{node.op_type} (node '{node.name or node.output[0]}')")
    return [missing[name] for name in sorted(missing)]


def _in_new_operators(model: Any) -> Any:
    """A file of years ago in the operators of today, whose shapes and bounds are inputs and no attributes.

    Shapes come first: what an old Softmax does depends on them.
    """
    import onnx

    if next(each.version for each in model.opset_import if each.domain in STANDARD) >= OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(onnx.shape_inference.infer_shapes(model), OPSET)
    except Exception:  # what cannot be converted is imported as it is
        return model


def _simplified(model: Any) -> Any:
    """With constants computed, shapes known and what does nothing left out, as onnxruntime does it before it runs.

    What is stored in few bits between layers it then computes in whole numbers, and is to be computed so here, too: a
    sum of fractions that is rounded otherwise is now and then stored otherwise, and one such number turns others.
    """
    known = {*STANDARD, *(node.domain for node in model.graph.node)}
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        whole = _optimized(model, "ORT_ENABLE_EXTENDED")
        if whole is not None and not _unsupported(whole.graph):
            return whole
    found = _optimized(model, "ORT_ENABLE_BASIC")
    return model if found is None or any(node.domain not in known for node in found.graph.node) else found


def _optimized(model: Any, level: str) -> Any | None:
    """As onnxruntime would run it; None where it cannot."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="saevit-tvm-onnx-") as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load(options.optimized_model_filepath)
        except Exception:  # what it cannot simplify is imported as it is
            return None


def _with_known_shapes(mod: tvm.IRModule) -> tvm.IRModule:
    """TVM computes at every inference what lies behind the shape of a tensor: where a negative index points, say."""

    @relax.expr_functor.mutator
    class Known(relax.PyExprMutator):
        def visit_call_(self, call: relax.Call) -> relax.Expr:
            if call.op == tvm.ir.Op.get("relax.shape_to_tensor") and call.args[0].ty.values is not None:
                extents = list(call.args[0].ty.values)
                if all(isinstance(extent, tvm.tirx.IntImm) for extent in extents):
                    return relax.const(np.array(list(map(int, extents))), "int64")
            return super().visit_call_(call)

    mod["main"] = Known().visit_expr(mod["main"])
    return mod


def _steps(model: Any, nodes: dict[str, Any], inputs: Inputs) -> Iterator[Step]:
    """onnxruntime's values of every node that became a variable."""
    import onnx

    named = {name: node for node in model.graph.node for name in node.output}
    wanted = [name for name in named if isinstance(nodes.get(name), relax.Var)]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
    session = exact_session(whole)
    given = dict(zip([each.name for each in session.get_inputs()], inputs, strict=True))
    for name, value in zip(wanted, session.run(None, given), strict=True):
        yield Step(named[name].op_type, f" (node '{named[name].name or name}')", nodes[name].name, np.asarray(value))
