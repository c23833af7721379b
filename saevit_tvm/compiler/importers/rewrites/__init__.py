"""Operators of PyTorch written with others, before anything is imported: what TVM lacks and PyTorch says shortly.

A file has `REWRITES`, functions by the names of the operators that they stand for. One that gives NotImplemented leaves
an operator as it is; what it writes is rewritten in turn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from schedules.discovery import modules

Rule = Callable[..., Any]


def rewrites() -> dict[str, list[Rule]]:
    """By the operator's name, as in "hypot.default"; of several rules the first that writes anything counts."""
    found: dict[str, list[Rule]] = {}
    for module in modules(sys.modules[__name__]):
        for name, rule in module.REWRITES.items():
            found.setdefault(name, []).append(rule)
    return found


def decompositions() -> dict[Any, Rule]:
    """By the operator itself, as torch.export takes them."""
    return {operator(name): partial(_first, rules) for name, rules in rewrites().items()}


def operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _first(rules: list[Rule], *args: Any, **kwargs: Any) -> Any:
    found = (rule(*args, **kwargs) for rule in rules)
    return next((each for each in found if each is not NotImplemented), NotImplemented)
