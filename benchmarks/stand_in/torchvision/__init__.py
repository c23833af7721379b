"""What timm asks of torchvision while it is imported: names. No model of timm calls any of it.

PyPI's torchvision wants a PyTorch with CUDA. Whoever has the real one uses that.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Name(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def _a_class(name: str) -> _Name:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


class _Modules(MetaPathFinder, Loader):
    """Any module below this one is there, and all that it is asked for is a class with nothing in it."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _a_class


__getattr__ = _a_class
sys.meta_path.append(_Modules())
