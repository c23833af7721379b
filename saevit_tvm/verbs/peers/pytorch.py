"""PyTorch itself: eager, and compiled by inductor with the weights frozen into the graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from saevit_tvm.support.errors import ModelError
from saevit_tvm.verbs.peers.base import Answer, Peer, read_example


class TorchEager(Peer):
    name = "torch"
    modules = ("torch",)
    install = "torch"

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        _require_module(model)
        shutil.copy(model, folder)

    def load(self, folder: Path, threads: int) -> Answer:
        import torch

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        (model,) = folder.glob("model.*")
        module = self.prepare(load_module(model))

        def answer(*inputs):
            with torch.inference_mode():
                return as_arrays(module(*map(torch.from_numpy, inputs)))

        return answer

    def prepare(self, module: Any) -> Any:
        return module


class TorchCompile(TorchEager):
    name = "torch-compile"

    def prepare(self, module: Any) -> Any:
        import torch
        import torch._inductor.config as inductor

        inductor.freezing = True
        return torch.compile(module)


def load_module(file: Path) -> Any:
    """The module that `bench` itself has just written."""
    import torch

    _require_module(file)
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    return torch.load(file, weights_only=False).eval()


def exported(file: Path, example: Path) -> Any:
    """Its graph, as `torch.export` sees it."""
    import torch

    _require_module(file)
    if file.suffix == ".pt2":
        return torch.export.load(file)
    return torch.export.export(load_module(file), tuple(map(torch.from_numpy, read_example(example))))


def _require_module(file: Path) -> None:
    if file.suffix == ".onnx":
        raise ModelError("it takes PyTorch modules, and this model is ONNX.")


def as_arrays(outputs: Any) -> list[Any]:
    tensors = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [tensor.numpy() for tensor in tensors]
