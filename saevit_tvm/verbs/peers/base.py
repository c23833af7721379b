"""What a runtime is to `bench`."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm.support.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from saevit_tvm.runtime.tensors import Inputs

    Answer = Callable[..., list["np.ndarray"]]  # of the model's inputs
else:
    Answer = Any

# Names another Python, for runtimes whose dependencies would not fit beside ours.
OTHER_PYTHON = "SAEVIT_TVM_PEERS_PYTHON"


class Peer(ABC):
    """One runtime. `convert` and `load` each run in a process of their own, which has nothing else to do."""

    name: str
    modules: tuple[str, ...] = ()  # what must be importable
    install: str = ""  # what to give pip for it; the first is the runtime itself

    def python(self) -> str | None:
        """The interpreter that has the runtime: this one, else the other one, else there is none."""
        if not self._missing_here():
            return sys.executable
        other = os.environ.get(OTHER_PYTHON)
        return other if other and _has(other, self.modules) else None

    def missing(self) -> list[str]:
        """What neither interpreter has."""
        return [] if self.python() else self._missing_here()

    def _missing_here(self) -> list[str]:
        return [module for module in self.modules if importlib.util.find_spec(module) is None]

    def version(self) -> str:
        return metadata.version(self.install.split()[0])

    @abstractmethod
    def convert(self, model: Path, example: Path, folder: Path) -> None:
        """Turn `model` (a pickled module `.pt`, a `.pt2`, or an `.onnx`) into what `load` reads from `folder`."""

    @abstractmethod
    def load(self, folder: Path, threads: int) -> Answer:
        """Ready to compute on `threads` threads; numpy in, numpy out."""

    def size(self, folder: Path) -> int:
        """Bytes of what has to be shipped for the model, the runtime itself aside."""
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def write_example(path: Path, inputs: Inputs) -> None:
    """The inputs of one inference, for `read_example`."""
    import numpy as np

    with path.open("wb") as file:
        np.save(file, inputs[0]) if len(inputs) == 1 else np.savez(file, *inputs)


def read_example(path: Path) -> Inputs:
    import numpy as np

    found = np.load(path)
    return (found,) if isinstance(found, np.ndarray) else tuple(found[name] for name in found.files)


@functools.cache
def _has(python: str, modules: tuple[str, ...]) -> bool:
    # -E: as its worker will be, without the import path of this process.
    code = "import sys, importlib.util as u; sys.exit(any(u.find_spec(name) is None for name in sys.argv[1:]))"
    try:
        return subprocess.run([python, "-E", "-c", code, *modules], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise UsageError(f"{OTHER_PYTHON} names '{python}', which cannot be run: {error.strerror}.") from error
