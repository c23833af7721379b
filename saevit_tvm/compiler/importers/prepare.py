"""An exported program before it is imported: taken apart, and what depends on no input computed by PyTorch itself.

Whatever can be computed here can no longer be imported wrongly, and leaves no work to do at every inference.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from saevit_tvm.compiler.importers import complex_numbers, constants, quickly
from saevit_tvm.compiler.importers.folding import GROWTH
from saevit_tvm.compiler.importers.rewrites import decompositions

# Operators that are imported as they are: taken apart they would be a gather of every pixel.
WHOLE = ("upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "col2im")

quickly.make_quick()


def prepared(exported: Any) -> Any:
    """The program that is imported."""
    program = exported.run_decompositions(dict(_table(quickly.registered())))
    _without_checks(program.graph)
    _fold(program)
    complex_numbers.replace(program)
    program.graph.lint()
    return program


@cache
def _table(_registered: tuple[int, int]) -> Mapping[Any, Any]:
    """How the operators that there are now are taken apart: the same ways each time, which `quickly` knows again."""
    table = {op: how for op, how in torch.export.default_decompositions().items() if _name(op) not in WHOLE}
    return table | decompositions()


def _name(op: Any) -> str:
    return op.__name__.partition(".")[0]


def _without_checks(graph: torch.fx.Graph) -> None:
    """Assertions of the model are about inputs that nobody gives: shapes are fixed, and values cannot be refused."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and "_assert" in node.name and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _fold(program: Any) -> None:
    """Values that depend on no input become constants; those that something else reads are kept."""
    known = _given(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and _is_foldable(node, known):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: known[each])
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            known[node] = value
    for node in [each for each in known if _is_computed(each) and _is_read(each, known)]:
        if isinstance(known[node], torch.Tensor):
            constant = constants.added(
                program, f"folded_{node.name}", known[node].contiguous().clone(), node.meta.get("val")
            )
            node.replace_all_uses_with(constant)
    for node in known:
        node.meta["constant"] = known[node]
    program.graph.eliminate_dead_code()


def _is_computed(node: Node) -> bool:
    """Not a view: patterns over the graph know a weight by its own shape."""
    return node.op == "call_function" and not getattr(node.target, "is_view", False)


def _is_read(node: Node, known: dict[Node, Any]) -> bool:
    """By something that depends on an input, perhaps through a view."""
    return any(user not in known or (not _is_computed(user) and _is_read(user, known)) for user in node.users)


def _given(program: Any) -> dict[Node, Any]:
    """Parameters, buffers and constants, by their placeholders."""
    signature, found = program.graph_signature, {}
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    targets = {spec.arg.name: spec.target for spec in signature.input_specs if spec.target in tensors}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            found[node] = tensors[targets[node.name]].detach()
    return found


def _is_foldable(node: Node, known: dict[Node, Any]) -> bool:
    if any(each not in known for each in node.all_input_nodes):
        return False
    target: Any = node.target
    if target is operator.getitem:
        return True
    schema = getattr(target, "_schema", None)
    if schema is None or schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True
    given = sum(known[each].numel() for each in node.all_input_nodes if isinstance(known[each], torch.Tensor))
    return value.numel() <= max(GROWTH, given)
