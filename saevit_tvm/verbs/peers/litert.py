"""LiteRT (TensorFlow Lite), converted from PyTorch by litert-torch, with its float32 XNNPACK delegate."""

from __future__ import annotations

from pathlib import Path

from saevit_tvm.verbs.peers.base import Answer, Peer
from saevit_tvm.verbs.peers.pytorch import load_module


class LiteRt(Peer):
    name = "litert"
    modules = ("ai_edge_litert", "litert_torch")
    install = "ai-edge-litert litert-torch"

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        module = load_module(model)
        import litert_torch
        import numpy as np
        import torch

        x = torch.from_numpy(np.load(example))
        litert_torch.convert(module, (x,)).export(str(folder / "model.tflite"))

    def load(self, folder: Path, threads: int) -> Answer:
        from ai_edge_litert.interpreter import Interpreter

        network = Interpreter(str(folder / "model.tflite"), num_threads=threads)
        network.allocate_tensors()
        signature = network.get_signature_runner()
        (entry,) = (details["index"] for details in signature.get_input_details().values())
        # The converter names them output_0, output_1, ...; the file may hold them in another order.
        outputs = signature.get_output_details()
        exits = [outputs[f"output_{number}"]["index"] for number in range(len(outputs))]

        def answer(x):
            network.set_tensor(entry, x)
            network.invoke()
            return [network.get_tensor(index) for index in exits]

        return answer
