"""What is found by its file, so that a new file needs no line in a list."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def modules(package: ModuleType) -> Iterator[ModuleType]:
    """In the order of their names."""
    for file in iter_modules(package.__path__):
        yield import_module(f"{package.__name__}.{file.name}")


def classes(package: ModuleType, base: Any) -> Iterator[Any]:
    """The classes that are defined in a package and can be made, in the order of their files."""
    for module in modules(package):
        for each in vars(module).values():
            own = isinstance(each, type) and each.__module__ == module.__name__
            if own and issubclass(each, base) and not isabstract(each):
                yield each
