"""The artifact under test, as one runtime among the others."""

from __future__ import annotations

from pathlib import Path

from saevit_tvm import __version__
from saevit_tvm.verbs.peers.base import Answer, Peer


class Ours(Peer):
    name = "saevit-tvm"
    modules = ("tvm_ffi",)

    def version(self) -> str:
        return __version__

    def load(self, folder: Path, threads: int) -> Answer:
        from saevit_tvm.runtime.engine import load

        (artifact,) = folder.glob("*.so")
        engine = load(artifact, threads=threads)

        def answer(x):
            outputs = engine(x)
            return list(outputs) if isinstance(outputs, tuple) else [outputs]

        return answer
