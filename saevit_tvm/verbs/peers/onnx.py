"""The runtimes that read ONNX: onnxruntime and OpenVINO, both in float32."""

from __future__ import annotations

import shutil
from pathlib import Path

from saevit_tvm.verbs.peers.base import Answer, Peer, read_example

OPSET = 17  # the first with LayerNormalization


class OnnxPeer(Peer):
    def convert(self, model: Path, example: Path, folder: Path) -> None:
        if model.suffix == ".onnx":
            shutil.copy(model, folder / "model.onnx")
            return
        import torch

        from saevit_tvm.verbs.peers.pytorch import load_module

        # The exporter that needs nothing but `onnx`; the newer one needs onnxscript as well.
        torch.onnx.export(
            load_module(model),
            tuple(map(torch.from_numpy, read_example(example))),
            str(folder / "model.onnx"),
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,  # a .pt2 cannot be told to evaluate, and does
        )


class OnnxRuntime(OnnxPeer):
    name = "onnxruntime"
    modules = ("onnxruntime", "onnx")
    install = "onnxruntime onnx"

    def load(self, folder: Path, threads: int) -> Answer:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


class OpenVino(OnnxPeer):
    name = "openvino"
    modules = ("openvino", "onnx")
    install = "openvino onnx"

    def load(self, folder: Path, threads: int) -> Answer:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # left alone it computes in bfloat16 where the CPU can
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        request = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", settings).create_infer_request()

        def answer(*inputs):
            results = request.infer(list(inputs), share_inputs=True, share_outputs=True)
            return [results[i] for i in range(len(results))]

        return answer
