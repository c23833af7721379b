"""TVM without PyTorch, though PyTorch may come later.

TVM imports PyTorch wherever it is installed, and then looks for its own names among PyTorch's libraries, too. Loaded by
itself, it is there in a third of the time; what needs PyTorch imports it afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TVM = ("tvm_ffi", "tvm")


class _Hiding(Loader):
    """Loads a package as its own loader does, while there is no PyTorch."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if "torch" in sys.modules:
            return self._loader.exec_module(module)
        sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            return self._loader.exec_module(module)
        finally:
            del sys.modules["torch"]


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in TVM else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Hiding(spec.loader)
        return spec


def load_tvm_first() -> None:
    """From now on, importing TVM does not import PyTorch."""
    sys.meta_path.insert(0, _Finder())
