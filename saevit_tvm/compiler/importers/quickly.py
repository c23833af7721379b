"""What torch.export does again for every program though it is the same each time: half of what takes one apart.

It asks PyTorch's dispatcher for all operators that are made of others, twice, and each time once for every namespace.
And it gives each of them twenty rules, through a function whose annotations Python evaluates again at every call.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._export import utils
from torch._subclasses.fake_impls import op_implementations_dict as fake_rules
from torch.export import decomp_utils, exported_program

_collect = utils._collect_all_valid_cia_ops
_found: dict[tuple[int, int], set[Any]] = {}


def registered() -> tuple[int, int]:
    """Another one after an operator was registered."""
    made_of_others = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    return len(made_of_others), len(torch._C._dispatch_get_all_op_names())


def operators_made_of_others() -> set[Any]:
    """The same as _collect_all_valid_cia_ops(), anew only after an operator was registered."""
    key = registered()
    if key not in _found:
        _found[key] = _collect()
    return set(_found[key])


class _Rules(NamedTuple):
    """What an operator that is `taken_apart` so had before that was said, and what then."""

    taken_apart: Any
    before: dict[Any, Any]
    then: dict[Any, Any]
    fake: Any


_override = exported_program._override_composite_implicit_decomp
_rules: dict[Any, _Rules] = {}


@contextmanager
def overridden(ways: Mapping[Any, Any]) -> Iterator[None]:
    """The same as _override_composite_implicit_decomp(ways): an operator's rules are made once, and put back after."""
    before = {op: dict(op.py_kernels) for op in ways}
    had_fake = {op for op in ways if op in fake_rules}
    known = {op for op, how in ways.items() if op not in had_fake and _is_known(op, how)}
    with _override({op: how for op, how in ways.items() if op not in known}):
        for op, how in ways.items():
            if op not in known and op not in had_fake:
                _rules[op] = _Rules(how, before[op], dict(op.py_kernels), fake_rules[op])
        try:
            for op in known:
                _give(op, _rules[op].then)
                fake_rules[op] = _rules[op].fake
            yield
        finally:
            for op in known:
                _give(op, before[op])
                fake_rules.pop(op, None)


def _is_known(op: Any, how: Any) -> bool:
    rules = _rules.get(op)
    return rules is not None and rules.taken_apart is how and rules.before == op.py_kernels


def _give(op: Any, rules: Mapping[Any, Any]) -> None:
    op.py_kernels.clear()
    op.py_kernels.update(rules)
    op._dispatch_cache.clear()


def make_quick() -> None:
    vars(exported_program)["_override_composite_implicit_decomp"] = overridden
    for module in (decomp_utils, exported_program):
        vars(module)["_collect_all_valid_cia_ops"] = operators_made_of_others
    # What typing makes of `Callable[A, B]` it keeps; what collections.abc makes, it makes anew.
    vars(torch._ops)["Callable"] = typing.Callable
