"""Regions of an exported program taken out of their blocks, as data: before PyTorch sees it.

`torch.no_grad()` and `torch.autocast()` within a model's forward become graphs within the graph. Without gradients the
first changes nothing; the second says how precisely to compute, and a library is built for a precision of its own
(`widening.py`). So their operators take the region's place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

REGION = "torch.ops.higher_order.wrap_with_"
AUTOCAST = REGION + "autocast"
ENABLED = 2  # which of autocast's arguments says whether it is one
VALUES = ("tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values")

Graph = dict[str, Any]
Node = dict[str, Any]


def inline(program: dict[str, Any]) -> bool:
    """Take all regions out of their blocks, in place; whether one of them asked for fewer bits."""
    regions = _flattened(program["graph_module"]["graph"])
    return any(each["target"] == AUTOCAST and each["inputs"][ENABLED]["arg"]["as_bool"] for each in regions)


def _flattened(graph: Graph) -> list[Node]:
    """The regions that the graph had, at any depth, each with its operators in its place now."""
    nodes: list[Node] = []
    regions: list[Node] = []
    for node in graph["nodes"]:
        if not node["target"].startswith(REGION):
            nodes.append(node)
            continue
        inner = next(each["arg"]["as_graph"]["graph"] for each in node["inputs"] if "as_graph" in each["arg"])
        regions += [node, *_flattened(inner)]
        nodes += _operators(node, inner, graph)
    graph["nodes"] = nodes
    return regions


def _operators(region: Node, inner: Graph, graph: Graph) -> list[Node]:
    """What the region computes, under names that the graph around it does not use, and its results under theirs."""
    given = [each["arg"] for each in region["inputs"]][-len(inner["inputs"]) or len(region["inputs"]) :]
    names = dict(zip(map(_name, inner["inputs"]), map(_name, given), strict=True))
    own = _names(inner) - names.keys()
    names |= fresh(own, graph)
    for kind in VALUES:
        graph[kind] |= {names[name]: value for name, value in inner[kind].items() if name in own}
    nodes = [
        with_inputs(node, lambda argument: renamed(argument, names))
        | {"name": names[node["name"]], "outputs": renamed(node["outputs"], names)}
        for node in inner["nodes"]
    ]
    for result, made in zip(region["outputs"], inner["outputs"], strict=True):
        argument = {"name": "self", "arg": renamed(made, names), "kind": 1}
        same = {"name": _name(result), "target": "torch.ops.aten.alias.default", "inputs": [argument]}
        nodes.append(region | same | {"outputs": [result], "is_hop_single_tensor_return": None})
    return nodes


def fresh(names: Iterable[str], graph: Graph) -> dict[str, str]:
    """For each a name that the graph does not use."""
    taken, found = _names(graph), {}
    for name in sorted(names):
        found[name] = next(new for i in itertools.count() if (new := f"{name}_{i}") not in taken)
        taken.add(found[name])
    return found


def _names(graph: Graph) -> set[str]:
    return {node["name"] for node in graph["nodes"]}.union(*(graph[kind] for kind in VALUES))


def _name(value: dict[str, Any]) -> str:
    """Of a tensor, or of a number that is computed."""
    (reference,) = value.values()
    return str(reference.get("name") or reference["as_name"])


def with_inputs(node: Node, change: Callable[[Any], Any]) -> Node:
    return node | {"inputs": [each | {"arg": change(each["arg"])} for each in node["inputs"]]}


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The same with every value of the graph under its new name."""
    if isinstance(value, list):
        return [renamed(each, names) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: names.get(each, each) if key in ("name", "as_name") else renamed(each, names)
        for key, each in value.items()
    }
