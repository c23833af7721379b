"""Operators of torch.export that TVM's importer lacks or gets wrong: one file each, found by itself.

A file has `OPERATORS`, the names of what it converts, and `convert(node, op)`, which gives the value in Relax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from saevit_tvm.compiler.importers.node import Emitter
from schedules.discovery import modules

Converter = Callable[[Any, Any], Any]


def converters() -> dict[str, Converter]:
    """By the operator's name, as in "elu.default"."""
    found = modules(sys.modules[__name__])
    return {operator: _converter(module) for module in found for operator in module.OPERATORS}


def _converter(module: ModuleType) -> Converter:
    return lambda node, importer: module.convert(node, Emitter(importer))
