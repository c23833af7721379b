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
from tvm import relax
from tvm.relax.dpl import is_op, wildcard

from saevit_tvm.compiler.importers.errors import reason
from saevit_tvm.compiler.importers.gate import Imported, Step
from saevit_tvm.compiler.passes.rewriting import Matched, Rule, rewrite, shape_of
from saevit_tvm.runtime.tensors import Inputs
from saevit_tvm.support.errors import CompileError

STANDARD = ("", "ai.onnx")  # names of ONNX's own operators

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def _importer() -> Any:
    """TVM's, with a variable for what every node gives that depends on the input."""
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    class Importer(ONNXGraphImporter):
        def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> relax.Expr:
            value = super()._convert_operator(op_name, inputs, attrs, opset)
            computed = isinstance(value, relax.Call) and isinstance(value.ty, relax.TensorType)
            return self.bb.emit(value) if computed and any(isinstance(each, relax.Var) for each in inputs) else value

    return Importer({}, None, keep_params_in_input=False)


def import_onnx(source: ModelSource) -> Imported:
    model = _simplified(source.onnx)
    importer = _importer()
    opset = next(each.version for each in model.opset_import if each.domain in STANDARD)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TVM prints what it cannot convert
            mod = importer.from_onnx(model.graph, opset)
    except Exception as error:
        raise CompileError(f"TVM cannot import {source.name}: {reason(error)}") from error
    return Imported(rewrite(mod, [_known_shape()]), partial(_steps, model, importer._nodes))


def _known_shape() -> Rule:
    """TVM asks a tensor for its shape, to count places from an axis's end, though it knows the shape."""
    data = wildcard()
    pattern = is_op("relax.shape_to_tensor")(is_op("relax.shape_of")(data))

    def replace(_expr: relax.Expr, matched: Matched) -> relax.Expr:
        return relax.const(np.array(shape_of(matched[data]), np.int64), "int64")

    return pattern, replace


def _simplified(model: Any) -> Any:
    """With constants computed, shapes known and what does nothing left out, as onnxruntime does it before it runs."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="saevit-tvm-onnx-") as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            found = onnx.load(options.optimized_model_filepath)
        except Exception:  # what it cannot simplify is imported as it is
            return model
    return found if all(node.domain in STANDARD for node in found.graph.node) else model


def _steps(model: Any, nodes: dict[str, Any], inputs: Inputs) -> Iterator[Step]:
    """onnxruntime's values of every node that became a variable."""
    import onnx
    import onnxruntime

    named = {name: node for node in model.graph.node for name in node.output}
    wanted = [name for name in named if isinstance(nodes.get(name), relax.Var)]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    given = dict(zip([each.name for each in session.get_inputs()], inputs, strict=True))
    for name, value in zip(wanted, session.run(None, given), strict=True):
        yield Step(named[name].op_type, f" (node '{named[name].name or name}')", nodes[name].name, np.asarray(value))
