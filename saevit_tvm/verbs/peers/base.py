"""What a runtime is to `bench`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Answer = Callable[["np.ndarray"], list["np.ndarray"]]
else:
    Answer = Any


class Peer:
    """One runtime. `convert` and `load` each run in a process of their own, which has nothing else to do."""

    name: str
    modules: tuple[str, ...] = ()  # what must be importable
    install: str = ""  # what to give pip for it
    default: bool = True  # whether it is compared with when nobody names it

    def missing(self) -> list[str]:
        return [module for module in self.modules if importlib.util.find_spec(module) is None]

    def convert(self, model: Path, example: Path, folder: Path) -> None:
        """Turn `model` (a pickled module `.pt`, a `.pt2`, or an `.onnx`) into what `load` reads from `folder`."""

    def load(self, folder: Path, threads: int) -> Answer:
        """Ready to compute on `threads` threads; numpy in, numpy out."""
        raise NotImplementedError

    def size(self, folder: Path) -> int:
        """Bytes of what has to be shipped for the model, the runtime itself aside."""
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
