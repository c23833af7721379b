"""ExecuTorch, its graph delegated to XNNPACK in float32 as far as XNNPACK takes it."""

from __future__ import annotations

from pathlib import Path

from saevit_tvm.verbs.peers.base import Answer, Peer
from saevit_tvm.verbs.peers.pytorch import as_arrays, exported


class ExecuTorch(Peer):
    name = "executorch"
    modules = ("executorch", "torch")
    install = "executorch"

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        graph = exported(model, example)
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()])
        (folder / "model.pte").write_bytes(program.to_executorch().buffer)

    def load(self, folder: Path, threads: int) -> Answer:
        import torch
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)  # it has one of its own, and this is the only way to say
        program = portable_lib._load_for_executorch(str(folder / "model.pte"))
        return lambda *inputs: as_arrays(program.forward(tuple(map(torch.from_numpy, inputs))))
