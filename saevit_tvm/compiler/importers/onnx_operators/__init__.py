"""Operators of ONNX that TVM's importer gets wrong, or writes as loops at once: one file each, found by itself.

A file has `OPERATORS`, the names of what it converts, and `convert(inputs, attributes, op)`, which gives the value in
Relax, or None for what TVM's own rule does well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from schedules.discovery import modules

Converter = Callable[[Any, Any, Any], Any]


@cache
def converters() -> dict[str, Converter]:
    return {name: module.convert for module in modules(sys.modules[__name__]) for name in module.OPERATORS}
