"""Branches that see the same values through convolutions, scales or nothing, and are added up, are one convolution.

Models that were trained with several branches in place of one (RepVGG and all that came after it) often arrive with
them: nothing is lost by adding up their weights beforehand, and the branches cost nothing any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from relay_patterns.graph import Graph
from relay_patterns.region import per_channel
from saevit_tvm.compiler.passes.rewriting import array, bind, constant, rewritten, shape_of

Pair = tuple[int, int]


@dataclass(frozen=True)
class Branch:
    """conv(x, weight) + bias. Without a weight: x times a factor by channel."""

    x: relax.Expr
    bias: np.ndarray
    weight: np.ndarray | None = None
    factor: np.ndarray | None = None
    strides: Pair = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def scaled(self, by: np.ndarray) -> Branch:
        weight = None if self.weight is None else self.weight * by[:, None, None, None]
        factor = None if self.factor is None else self.factor * by
        return replace(self, bias=self.bias * by, weight=weight, factor=factor)

    def plus(self, other: Branch) -> Branch | None:
        """Both in one, or None where no one convolution computes their sum."""
        if not self.x.same_as(other.x) or (self.weight is None and other.weight is None):
            return None
        if self.weight is None or (other.weight is not None and other.weight.shape[2:] > self.weight.shape[2:]):
            return other.plus(self)
        same = self._like(other)
        added = None if same is None or same.weight is None else self._put(same)
        return None if added is None else replace(self, weight=added, bias=self.bias + other.bias)

    def _like(self, other: Branch) -> Branch | None:
        """The other as a convolution with as many groups."""
        assert self.weight is not None
        if other.weight is not None:
            alike = (self.strides, self.groups) == (other.strides, other.groups)
            return other if alike and self.weight.shape[:2] == other.weight.shape[:2] else None
        channels, within = self.weight.shape[:2]
        if self.strides != (1, 1) or other.factor is None or len(other.factor) != channels != within * self.groups:
            return None
        weight = np.zeros((channels, within, 1, 1), np.float64)
        weight[np.arange(channels), np.arange(channels) % within, 0, 0] = other.factor
        return replace(other, weight=weight)

    def _put(self, other: Branch) -> np.ndarray | None:
        """This one's weights, with the other's added where they see the same numbers."""
        assert self.weight is not None and other.weight is not None
        window = []
        for axis in (0, 1):
            step, size = self.dilation[axis], other.weight.shape[2 + axis]
            first, beyond = divmod(self.padding[axis] - other.padding[axis], step)
            stepped = size == 1 or other.dilation[axis] == step
            if beyond or not stepped or first < 0 or first + size > self.weight.shape[2 + axis]:
                return None
            window.append(slice(first, first + size))
        weight = self.weight.astype(np.float64)
        weight[:, :, window[0], window[1]] += other.weight
        return weight


@tvm.ir.transform.module_pass(opt_level=0, name="MergeBranches")
class MergeBranches:
    """Make one convolution of every sum that one convolution computes."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return rewritten(mod, _Rewriter(mod, Graph(mod["main"])))


@relax.expr_functor.mutator
class _Rewriter(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, graph: Graph) -> None:
        super().__init__(mod)
        self._graph = graph
        self._branches: dict[relax.Var, Branch] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        branch, merged = self._read(binding.value) if isinstance(binding.value, relax.Call) else (None, False)
        if branch is not None:
            self._branches[binding.var] = branch
        if branch is None or not merged:
            return super().visit_var_binding_(binding)
        return bind(self, binding.var, self._computed(branch))

    def _computed(self, branch: Branch) -> relax.Expr:
        assert branch.weight is not None
        conv = relax.op.nn.conv2d(
            self.visit_expr(branch.x),
            constant(branch.weight),
            strides=branch.strides,
            padding=branch.padding,
            dilation=branch.dilation,
            groups=branch.groups,
        )
        return relax.op.add(self.builder_.emit(conv), constant(branch.bias.reshape(1, -1, 1, 1)))

    def _read(self, call: relax.Call) -> tuple[Branch | None, bool]:
        """What a call computes as one branch, and whether it is more than one in the graph."""
        operator = getattr(call.op, "name", "")
        if len(getattr(call.ty, "shape", ())) != 4:
            return None, False
        if operator == "relax.nn.conv2d":
            return _convolution(call), False
        if operator not in ("relax.add", "relax.subtract", "relax.multiply"):
            return None, False
        left, right = call.args
        if isinstance(left, tvm.ir.GenericConst) and operator != "relax.subtract":
            left, right = right, left
        if not isinstance(left, relax.Var) or shape_of(left) != shape_of(call):
            return None, False
        if isinstance(right, tvm.ir.GenericConst):
            return self._by_channel(operator, left, per_channel(right, shape_of(left)[1])), False
        if operator == "relax.multiply" or not isinstance(right, relax.Var) or shape_of(right) != shape_of(call):
            return None, False
        other = self._branch(right)
        other = other.scaled(np.full(len(other.bias), -1.0)) if operator == "relax.subtract" else other
        merged = self._branch(left).plus(other)
        return merged, merged is not None

    def _by_channel(self, operator: str, value: relax.Var, weight: np.ndarray | None) -> Branch | None:
        if weight is None:
            return None
        branch = self._branch(value)
        if operator == "relax.multiply":
            return branch.scaled(weight)
        return replace(branch, bias=branch.bias + (-weight if operator == "relax.subtract" else weight))

    def _branch(self, value: relax.Var) -> Branch:
        """What led to a value that nothing else reads; else the value itself."""
        if value in self._branches and len(self._graph.users(value)) == 1 and value not in self._graph.outputs:
            return self._branches[value]
        channels = shape_of(value)[1]
        return Branch(value, np.zeros(channels), factor=np.ones(channels))


def _convolution(call: relax.Call) -> Branch | None:
    x, weight = call.args
    attrs, shape = call.attrs, shape_of(call)
    if not isinstance(x, relax.Var) or not isinstance(weight, tvm.ir.GenericConst):
        return None
    if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "OIHW"):
        return None
    (down, across), (dilated, wide) = (map(int, each) for each in (attrs.strides, attrs.dilation))
    return Branch(
        x,
        np.zeros(shape[1]),
        weight=array(weight),
        strides=(down, across),
        padding=tuple(map(int, attrs.padding)),
        dilation=(dilated, wide),
        groups=int(attrs.groups),
    )
