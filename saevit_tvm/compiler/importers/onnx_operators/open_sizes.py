"""Operators that give as many values as the picture says."""

from __future__ import annotations

from typing import Any

from saevit_tvm.compiler.importers.node import Emitter

OPERATORS = ("Compress", "NonMaxSuppression", "Unique")


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> None:
    raise ValueError(
        "how many values it gives depends on the picture, and a library has fixed sizes: "
        "let the model end before it, and do the rest in the program that calls the library"
    )
