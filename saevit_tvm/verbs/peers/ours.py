"""The artifact under test, as one runtime among the others."""

from __future__ import annotations

import shutil
from pathlib import Path

from saevit_tvm.support.version import __version__
from saevit_tvm.verbs.peers.base import Answer, Peer


class Ours(Peer):
    name = "saevit-tvm"
    modules = ("tvm_ffi",)

    def version(self) -> str:
        return __version__

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        """What the compiler made is what is loaded."""
        shutil.copy(model, folder / "artifact.so")

    def load(self, folder: Path, threads: int) -> Answer:
        from saevit_tvm.runtime.engine import load

        (artifact,) = folder.glob("*.so")
        engine = load(artifact, threads=threads)

        def answer(*inputs):
            outputs = engine(*inputs)
            return list(outputs) if isinstance(outputs, tuple) else [outputs]

        return answer
