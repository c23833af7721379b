"""A program whose weights have sixteen bits, or that asks for so few, computed in thirty-two: before PyTorch sees it.

`model.half()` and `torch.autocast()` are how a GPU was to be kept busy. What a weight is worth stays as it was stored;
how precisely the library computes with it is `--dtype`, as for every other model. What goes in and what comes out keeps
its type, but for bfloat16, which NumPy does not have: that is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from saevit_tvm.models.inlining import fresh, renamed, with_inputs

# PyTorch's numbers for them, which archives use.
HALF, FLOAT, BFLOAT16 = 6, 7, 13
NARROW = (HALF, BFLOAT16)
ENDS = {"input_specs": "user_input", "output_specs": "user_output"}

Node = dict[str, Any]


def has_narrow_weights(config: dict[str, Any]) -> bool:
    return any(tensor["tensor_meta"]["dtype"] in NARROW for tensor in config["config"].values())


def widened(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return tensor
    wide = tensor.detach().float()
    return torch.nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else wide


def widen(program: dict[str, Any]) -> None:
    """Everything in float32, in place, but halves that go in and come out."""
    graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
    values = graph["tensor_values"]
    taken, given = (
        {name for name in _ends(signature[specs], end) if values[name]["dtype"] == HALF} for specs, end in ENDS.items()
    )
    wide, narrow = fresh(taken, graph), fresh(given, graph)
    nodes = [with_inputs(node, lambda argument: _wide(renamed(argument, wide))) for node in graph["nodes"]]
    first = [_cast(name, wide[name], FLOAT) for name in wide]
    last = [_cast(wide.get(name, name), narrow[name], HALF) for name in narrow]
    graph["nodes"] = [*first, *nodes, *last]
    halves = {narrow.get(name, name): values[name] for name in taken | given}
    floats = {
        wide.get(name, name): value | {"dtype": FLOAT} for name, value in values.items() if value["dtype"] in NARROW
    }
    graph["tensor_values"] = values | floats | halves
    graph["outputs"] = renamed(graph["outputs"], narrow)
    signature["output_specs"] = [
        renamed(spec, narrow) if "user_output" in spec else spec for spec in signature["output_specs"]
    ]


def _ends(specs: list[dict[str, Any]], end: str) -> Iterator[str]:
    for spec in specs:
        if end in spec and "as_tensor" in spec[end]["arg"]:
            yield spec[end]["arg"]["as_tensor"]["name"]


def _wide(argument: dict[str, Any]) -> dict[str, Any]:
    return {"as_scalar_type": FLOAT} if argument.get("as_scalar_type") in NARROW else argument


def _cast(value: str, name: str, dtype: int) -> Node:
    arguments = {"self": {"as_tensor": {"name": value}}, "dtype": {"as_scalar_type": dtype}}
    return {
        "target": "torch.ops.aten.to.dtype",
        "name": name,
        "inputs": [{"name": key, "arg": argument, "kind": 1} for key, argument in arguments.items()],
        "outputs": [{"as_tensor": {"name": name}}],
        "metadata": {},
        "is_hop_single_tensor_return": None,
    }
