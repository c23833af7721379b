"""LiteRT (TensorFlow Lite), converted from PyTorch by litert-torch, with its float32 XNNPACK delegate."""

from __future__ import annotations

from pathlib import Path

from saevit_tvm.verbs.peers.base import Answer, Peer, read_example
from saevit_tvm.verbs.peers.pytorch import load_module


class LiteRt(Peer):
    name = "litert"
    modules = ("ai_edge_litert", "litert_torch")
    install = "ai-edge-litert litert-torch"

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        module = load_module(model)
        import litert_torch
        import torch

        inputs = tuple(map(torch.from_numpy, read_example(example)))
        litert_torch.convert(module, inputs).export(str(folder / "model.tflite"))

    def load(self, folder: Path, threads: int) -> Answer:
        from ai_edge_litert.interpreter import Interpreter

        network = Interpreter(str(folder / "model.tflite"), num_threads=threads)
        network.allocate_tensors()
        signature = network.get_signature_runner()
        # The converter names them args_0, output_0, output_1, ...; the file may hold them in another order.
        inputs, outputs = signature.get_input_details(), signature.get_output_details()
        entries = [inputs[f"args_{number}"]["index"] for number in range(len(inputs))]
        exits = [outputs[f"output_{number}"]["index"] for number in range(len(outputs))]

        def answer(*given):
            for index, x in zip(entries, given, strict=True):
                network.set_tensor(index, x)
            network.invoke()
            return [network.get_tensor(index) for index in exits]

        return answer
