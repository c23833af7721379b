"""MNN, converted from ONNX, with its precision "high", which is float32.

Its command line `mnnconvert` installs packages and reports what it did to a server. The conversion itself is a
function of its extension module, and that is all that is called here.
"""

from __future__ import annotations

import json
from pathlib import Path

from saevit_tvm.support.errors import ModelError
from saevit_tvm.verbs.peers.base import Answer
from saevit_tvm.verbs.peers.onnx import OnnxPeer


class Mnn(OnnxPeer):
    name = "mnn"
    modules = ("MNN", "_tools", "onnx")
    install = "MNN onnx"

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        super().convert(model, example, folder)
        import _tools
        import MNN  # noqa: F401  (the converter needs its libraries)
        import onnx

        source, result = folder / "model.onnx", folder / "model.mnn"
        graph = onnx.load(source).graph
        names = {"inputs": [value.name for value in graph.input], "outputs": [value.name for value in graph.output]}
        files = ["--modelFile", str(source), "--MNNModel", str(result)]
        exact = ["--useGeluApproximation", "0"]  # its default is the tanh formula, 1e-3 off in the end
        _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, *exact, "--bizCode", "saevit"])
        if not result.exists():
            raise ModelError("MNN's converter wrote no model.")
        source.unlink()
        (folder / "names.json").write_text(json.dumps(names))

    def load(self, folder: Path, threads: int) -> Answer:
        import MNN
        import numpy as np

        names = json.loads((folder / "names.json").read_text())
        expr = MNN.expr
        net = MNN.nn.load_module_from_file(
            str(folder / "model.mnn"),
            names["inputs"],
            names["outputs"],
            backend=expr.Backend.CPU,
            precision_mode=expr.PrecisionMode.High,
            thread_num=threads,
            shape_mutable=False,
            rearrange=True,
        )

        def entry(x):
            made = expr.placeholder(list(x.shape), expr.NCHW, expr.dtype(x.dtype.name))
            made.write(x)
            return made

        def answer(*inputs):
            outputs = net.forward([entry(x) for x in inputs])
            outputs = outputs if isinstance(outputs, list) else [outputs]
            return [np.array(expr.convert(output, expr.NCHW).read(), copy=True) for output in outputs]

        return answer
