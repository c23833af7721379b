"""A node of an exported program, as converters read it."""

from __future__ import annotations

import operator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import tvm
from torch.fx import Node
from tvm import relax


def arguments(node: Node, op: Emitter) -> dict[str, Any]:
    """All arguments by name, those that are not given by their defaults; tensors as values of Relax."""
    declared = _declared(node)
    given = {each.name: each.default_value for each in declared if each.has_default_value()}
    given |= dict(zip([each.name for each in declared], node.args, strict=False)) | node.kwargs
    return torch.fx.node.map_arg(given, lambda each: op.importer.env[each])


def argument(node: Node, name: str) -> Any:
    """One argument as it stands in the program."""
    names = [each.name for each in _declared(node)]
    return node.kwargs[name] if name in node.kwargs else dict(zip(names, node.args, strict=False)).get(name)


def _declared(node: Node) -> Any:
    target: Any = node.target
    return target._schema.arguments


def only_first(node: Node, what: str) -> None:
    """Refuses a model that reads more than the first of a node's values."""
    if any(user.target is operator.getitem and user.args[1] != 0 for user in node.users):
        raise ValueError(f"{what} is read, which no rule computes")


def constant(value: Any) -> np.ndarray | None:
    """What a node is known to be, whatever the input."""
    known = value.meta.get("constant") if isinstance(value, Node) else None
    return None if known is None else known.detach().numpy()


def known(x: relax.Expr) -> Any:
    """The value of a constant of Relax, or None."""
    return x.value.numpy() if isinstance(x, tvm.ir.GenericConst) else None


def shape(x: relax.Expr) -> tuple[int, ...]:
    return tuple(int(extent) for extent in x.ty.shape)


def dtype(x: relax.Expr) -> str:
    return str(x.ty.dtype.dtype) if hasattr(x.ty.dtype, "dtype") else str(x.ty.dtype)


def indices(values: Any) -> relax.Expr:
    """Positions as a constant."""
    return relax.const(np.asarray(values), "int32")


class Emitter:
    """relax.op for converters, with every value given a type at once: `op.nn.pad(x, ..)`. `importer` is TVM's."""

    def __init__(self, importer: Any, namespace: Any = relax.op) -> None:
        self.importer, self._namespace = importer, namespace

    def tuple(self, *values: relax.Expr) -> relax.Expr:
        return self.importer.block_builder.emit(relax.Tuple(values))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._namespace, name)
        if isinstance(found, ModuleType):
            return Emitter(self.importer, found)
        return lambda *args, **kwargs: self.importer.block_builder.emit(found(*args, **kwargs))
