"""What torch.export does again for every program though it is the same each time: half of what takes one apart.

It asks PyTorch's dispatcher for all operators that are made of others, twice, and each time once for every namespace.
And it gives each of them rules, through a function whose annotations Python evaluates again at every call.
"""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch._export import utils
from torch.export import decomp_utils, exported_program

_collect = utils._collect_all_valid_cia_ops
_found: dict[tuple[int, int], set[Any]] = {}


def operators_made_of_others() -> set[Any]:
    """The same as _collect_all_valid_cia_ops(), anew only after an operator was registered."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    key = (len(registered), len(torch._C._dispatch_get_all_op_names()))
    if key not in _found:
        _found[key] = _collect()
    return set(_found[key])


def make_quick() -> None:
    for module in (decomp_utils, exported_program):
        vars(module)["_collect_all_valid_cia_ops"] = operators_made_of_others
    # What typing makes of `Callable[A, B]` it keeps; what collections.abc makes, it makes anew.
    vars(torch._ops)["Callable"] = typing.Callable
