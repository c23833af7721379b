"""The runtimes that `bench` compares with: each computes the same PyTorch model, stored and computed in float32.

One small class a runtime: what it needs, how a model is converted for it (once, offline), and how a
process loads the result. Importing this package imports none of them.
"""

from __future__ import annotations

from saevit_tvm.support.errors import unknown
from saevit_tvm.verbs.peers.base import Answer, Peer
from saevit_tvm.verbs.peers.executorch import ExecuTorch
from saevit_tvm.verbs.peers.litert import LiteRt
from saevit_tvm.verbs.peers.mnn import Mnn
from saevit_tvm.verbs.peers.ncnn import Ncnn
from saevit_tvm.verbs.peers.onnx import OnnxRuntime, OpenVino
from saevit_tvm.verbs.peers.ours import Ours
from saevit_tvm.verbs.peers.pytorch import TorchCompile, TorchEager

__all__ = ["OURS", "PEERS", "Answer", "Peer", "get"]

OURS = Ours()
PEERS: tuple[Peer, ...] = (
    TorchEager(),
    TorchCompile(),
    OnnxRuntime(),
    OpenVino(),
    Ncnn(),
    Mnn(),
    ExecuTorch(),
    LiteRt(),
)


def get(name: str) -> Peer:
    """A runtime by name."""
    for peer in (OURS, *PEERS):
        if peer.name == name:
            return peer
    raise unknown("runtime to compare with", name, [peer.name for peer in PEERS])
