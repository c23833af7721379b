"""Constants that are added to an exported program."""

from __future__ import annotations

from typing import Any

import torch
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node


def added(program: Any, name: str, value: torch.Tensor, like: Any) -> Node:
    """The placeholder of a new constant; `like` is what stands for its value while nothing is computed."""
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        constant = program.graph.placeholder(name)
    constant.meta = {"val": like, "constant": value}
    spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=constant.name), target=constant.name)
    program.graph_signature.input_specs.insert(0, spec)
    program.constants[constant.name] = value
    return constant


def removed(program: Any, constant: Node) -> None:
    """Without a constant, parameter or buffer that nothing reads."""
    (spec,) = (each for each in program.graph_signature.input_specs if each.arg.name == constant.name)
    program.graph_signature.input_specs.remove(spec)
    program.constants.pop(spec.target, None)
    program.graph.erase_node(constant)
