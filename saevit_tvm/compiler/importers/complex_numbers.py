"""A program of complex numbers becomes one of real numbers, which is all that TVM knows.

Each complex tensor is two, its real and its imaginary part, and each operator is written with these. A Fourier
transform is linear along each axis: PyTorch itself transforms the unit matrix, and the parts are multiplied by it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from saevit_tvm.compiler.importers import constants

aten = torch.ops.aten
Part = Node | float | None  # None: zero everywhere
NOTHING = 1e-12  # of a transform of ones


class Pair(NamedTuple):
    real: Part
    imag: Part


def is_complex(node: Node) -> bool:
    """Whether a node gives complex numbers, or reads them."""
    return any(map(_is_complex, (node, *node.all_input_nodes)))


def lacks_rule(node: Node) -> bool:
    """Of a node with complex numbers. What is known needs none; sums and the like may not change the type."""
    name = name_of(node)
    has_one = name in RULES and not (name in BOTH and node.kwargs.get("dtype") is not None)
    return node.op == "call_function" and "constant" not in node.meta and not has_one


def replace(program: Any) -> None:
    """Every complex number by two real ones; nothing where an operator has no rule."""
    nodes = [node for node in program.graph.nodes if is_complex(node)]
    if any(map(lacks_rule, nodes)):
        return
    writer = _Writer(program)
    for node in nodes:
        if node.op == "call_function":
            writer.write(node)
    program.graph.eliminate_dead_code()
    for node in nodes:
        if node.op == "placeholder" and not node.users:
            constants.removed(program, node)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(each, Tensor) and each.is_complex() for each in values)


def name_of(node: Node) -> str:
    return "getitem" if node.target is operator.getitem else getattr(node.target, "__name__", str(node.target))


class _Writer:
    """Writes real operators in front of the node that they stand for."""

    def __init__(self, program: Any) -> None:
        self.program, self.pairs = program, dict[Node, Pair]()
        self.node: Node

    def write(self, node: Node) -> None:
        self.node = node
        with self.program.graph.inserting_before(node):
            written = self._constant_of(node) if "constant" in node.meta else RULES[name_of(node)](self, node)
            if isinstance(written, Pair):
                self.pairs[node] = written
            elif written is not None:
                node.replace_all_uses_with(written)

    # What is read

    def pair(self, value: Any) -> Pair:
        """The parts of a node, or of a number."""
        if isinstance(value, Node):
            if value not in self.pairs:
                self.pairs[value] = self._known(value) if _is_complex(value) else Pair(value, None)
            return self.pairs[value]
        number = complex(value)
        return Pair(number.real or None, number.imag or None)

    def _constant_of(self, node: Node) -> Node | None:
        """In place of a node that is known; where it is complex, whoever reads it asks for its parts."""
        return None if _is_complex(node) else self.constant(node.meta["constant"])

    def _known(self, node: Node) -> Pair:
        parts = torch.view_as_real(node.meta["constant"].resolve_conj()).unbind(-1)
        return Pair(*(self.constant(part) for part in parts))

    def constant(self, value: Tensor) -> Node:
        value = value.contiguous().clone()
        return constants.added(self.program, f"{self.node.name}_part", value, _mode(self.node).from_tensor(value))

    def filled(self, part: Part, like: Any) -> Node:
        """A part as a tensor of the shape that it stands for, where it may be a number or smaller."""
        if isinstance(part, Node):
            shape = like.shape
            return part if part.meta["val"].shape == shape else self.call(aten.expand.default, part, list(shape))
        return self.constant(torch.full(like.shape, part or 0.0, dtype=_real(like.dtype)))

    # What is written

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.program.graph.call_function(target, args, kwargs)
        given, named = map_arg((args, kwargs), lambda each: each.meta["val"])
        with _mode(self.node):
            node.meta["val"] = target(*given, **named)
        if "stack_trace" in self.node.meta:
            node.meta["stack_trace"] = self.node.meta["stack_trace"]
        return node

    def add(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return b if a is None else a
        return self._two(aten.add, a, b)

    def subtract(self, a: Part, b: Part) -> Part:
        if isinstance(a, Node) and isinstance(b, Node):
            return self.call(aten.sub.Tensor, a, b)
        return self.add(a, self.negative(b))

    def multiply(self, a: Part, b: Part) -> Part:
        return None if a is None or b is None else self._two(aten.mul, a, b)

    def divide(self, a: Part, b: Part) -> Part:
        if a is None:
            return None
        if isinstance(b, Node):
            return self.call(aten.div.Tensor, a if isinstance(a, Node) else self.filled(a, b.meta["val"]), b)
        return self._two(aten.div, a, b or 0.0)

    def negative(self, a: Part) -> Part:
        return self.call(aten.neg.default, a) if isinstance(a, Node) else None if a is None else -a

    def _two(self, op: Any, a: Any, b: Any) -> Node:
        if isinstance(a, Node) and isinstance(b, Node):
            return self.call(op.Tensor, a, b)
        return self.call(op.Scalar, *((a, b) if isinstance(a, Node) else (b, a)))

    def unary(self, op: Any, a: Part) -> Node:
        return self.call(op.default, a)

    def product(self, a: Pair, b: Pair, multiply: Callable[[Part, Part], Part]) -> Pair:
        real = self.subtract(multiply(a.real, b.real), multiply(a.imag, b.imag))
        return Pair(real, self.add(multiply(a.real, b.imag), multiply(a.imag, b.real)))


def _mode(node: Node) -> Any:
    """Under which shapes are known and nothing is computed."""
    value = node.meta["val"]
    return (value[0] if isinstance(value, (tuple, list)) else value).fake_mode


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


# Rules: a pair of what a node gives, a node where that is real, or nothing where all who read it were served -------


def _both(at: _Writer, node: Any) -> Pair:
    """What is done with complex numbers is done with both of their parts."""

    def done(which: int) -> Part:
        def part(given: Node) -> Node:
            return at.filled(at.pair(given)[which], given.meta["val"]) if _is_complex(given) else given

        if all(at.pair(each)[which] is None for each in node.all_input_nodes if _is_complex(each)):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), part)
        return at.call(node.target, *args, **kwargs)

    return Pair(done(0), done(1))


def _one_of(at: _Writer, node: Any) -> Pair:
    """Of several tensors; what is zero everywhere, is so in each."""
    of, which = node.args
    parts = (None if part is None else at.call(operator.getitem, part, which) for part in at.pair(of))
    return Pair(*parts)


def _joined(at: _Writer, node: Any) -> Pair:
    tensors, *rest = node.args
    return Pair(*(at.call(node.target, _parts(at, tensors, which), *rest) for which in (0, 1)))


def _where(at: _Writer, node: Any) -> Pair:
    condition, *values = node.args
    return Pair(*(at.call(node.target, condition, *_parts(at, values, which)) for which in (0, 1)))


def _parts(at: _Writer, tensors: Any, which: int) -> list[Node]:
    """Of complex and of real tensors."""
    return [at.filled(at.pair(each)[which], each.meta["val"]) for each in tensors]


def _padded(at: _Writer, node: Any) -> Pair:
    x, pads, value = (*node.args, 0)[:3]

    def padded(part: Part, by: float) -> Part:
        zero = part is None and not by
        return None if zero else at.call(node.target, at.filled(part, x.meta["val"]), pads, by)

    real, imag = at.pair(x)
    return Pair(padded(real, complex(value).real), padded(imag, complex(value).imag))


def _copied(at: _Writer, node: Any) -> Pair | Node:
    """Perhaps to another type: a real number becomes a complex one, or a complex one loses its imaginary part."""
    kwargs = {**node.kwargs, "dtype": _real(node.meta["val"].dtype)}
    real, imag = (None if part is None else at.call(node.target, part, **kwargs) for part in at.pair(node.args[0]))
    return Pair(real, imag) if _is_complex(node) else at.filled(real, node.meta["val"])


def _from_parts(at: _Writer, node: Any) -> Pair:
    real, imag = node.args
    return Pair(*(at.filled(each, node.meta["val"]) for each in (real, imag)))


def _of_one_number(at: _Writer, node: Any) -> Pair:
    return _as_large(at, node, at.pair(node.args[1]))


def _written_over(at: _Writer, node: Any) -> Pair | Node:
    pair = at.pair(node.args[1])
    return _as_large(at, node, pair) if _is_complex(node) else at.filled(pair.real, node.meta["val"])


def _from_last_axis(at: _Writer, node: Any) -> Pair:
    return Pair(*(at.call(aten.select.int, node.args[0], -1, which) for which in (0, 1)))


def _to_last_axis(at: _Writer, node: Any) -> Node | None:
    x = node.args[0]
    parts = [at.filled(part, x.meta["val"]) for part in at.pair(x)]
    rank, others = node.meta["val"].dim(), False
    for user in list(node.users):
        if user.target is aten.select.int and user.args[1] % rank == rank - 1:
            user.replace_all_uses_with(parts[user.args[2]])  # the real or the imaginary part alone
        else:
            others = True
    if not others:
        return None
    return at.call(aten.cat.default, [at.call(aten.unsqueeze.default, part, -1) for part in parts], -1)


def _conjugate(at: _Writer, node: Any) -> Pair:
    real, imag = at.pair(node.args[0])
    return Pair(real, at.negative(imag))


def _sum(at: _Writer, node: Any) -> Pair:
    a, b = (at.pair(each) for each in node.args)
    combine = at.subtract if node.target is aten.sub.Tensor else at.add
    return _as_large(at, node, Pair(*(combine(*parts) for parts in zip(a, b, strict=True))))


def _product(at: _Writer, node: Any) -> Pair:
    a, b = (at.pair(each) for each in node.args)
    return _as_large(at, node, at.product(a, b, at.multiply))


def _matrix_product(at: _Writer, node: Any) -> Pair:
    def multiply(a: Part, b: Part) -> Part:
        return None if a is None or b is None else at.call(OF_MATRICES[name_of(node)], a, b)

    *added, left, right = (at.pair(each) for each in node.args)
    found = at.product(left, right, multiply)
    for each in added:
        terms = [_times(at, each, node.kwargs.get("beta", 1)), _times(at, found, node.kwargs.get("alpha", 1))]
        found = Pair(*(at.add(*parts) for parts in zip(*terms, strict=True)))
    return _as_large(at, node, found)


def _times(at: _Writer, pair: Pair, factor: complex) -> Pair:
    return pair if factor == 1 else at.product(pair, at.pair(factor), at.multiply)


def _quotient(at: _Writer, node: Any) -> Pair:
    a, b = (at.pair(each) for each in (node.args if len(node.args) == 2 else (1.0, *node.args)))
    if b.imag is not None:
        size = at.add(at.multiply(b.real, b.real), at.multiply(b.imag, b.imag))
        a, b = at.product(a, Pair(b.real, at.negative(b.imag)), at.multiply), Pair(size, None)
    return _as_large(at, node, Pair(*(at.divide(part, b.real) for part in a)))


def _as_large(at: _Writer, node: Any, pair: Pair) -> Pair:
    """Parts repeated as the result is: the smaller of two tensors may be the only one that has both."""
    like = node.meta["val"]
    return Pair(*(None if part is None else at.filled(part, like) for part in pair))


def _size(at: _Writer, node: Any) -> Node:
    real, imag = at.pair(node.args[0])
    if real is None or imag is None:
        return at.unary(aten.abs, at.filled(real if imag is None else imag, node.meta["val"]))
    return at.unary(aten.sqrt, at.add(at.multiply(real, real), at.multiply(imag, imag)))


def _angle(at: _Writer, node: Any) -> Node:
    real, imag = (at.filled(part, node.meta["val"]) for part in at.pair(node.args[0]))
    return at.call(aten.atan2.default, imag, real)


def _power_of_e(at: _Writer, node: Any) -> Pair:
    real, imag = at.pair(node.args[0])
    return _from_size(at, node, 1.0 if real is None else at.unary(aten.exp, real), imag)


def _from_polar(at: _Writer, node: Any) -> Pair:
    return _from_size(at, node, *node.args)


def _from_size(at: _Writer, node: Any, size: Part, angle: Part) -> Pair:
    if angle is None:
        return _as_large(at, node, Pair(size, None))
    return _as_large(at, node, Pair(*(at.multiply(size, at.unary(op, angle)) for op in (aten.cos, aten.sin))))


def _fourier(at: _Writer, node: Any) -> Pair | Node:
    """One axis after the other: the halved one first of what is real, last of what becomes real."""
    x, axes, norm, how = node.args
    along: list[tuple[int, Callable[[Tensor], Tensor]]]
    if node.target is aten._fft_r2c.default:
        along = [(axes[-1], lambda rows: aten._fft_r2c(rows.real, [1], norm, how))]
        along += [(axis, lambda rows: aten._fft_c2c(rows, [1], norm, True)) for axis in axes[:-1]]
    elif node.target is aten._fft_c2r.default:
        along = [(axis, lambda rows: aten._fft_c2c(rows, [1], norm, False)) for axis in axes[:-1]]
        along += [(axes[-1], lambda rows: aten._fft_c2r(rows, [1], norm, how))]
    else:
        along = [(axis, lambda rows: aten._fft_c2c(rows, [1], norm, how)) for axis in axes]
    pair, extents = at.pair(x), list(x.meta["val"].shape)
    for axis, transform in along:
        pair, extents[axis] = _along(at, pair, axis, extents[axis], transform)
    return pair if _is_complex(node) else at.filled(pair.real, node.meta["val"])


def _along(at: _Writer, pair: Pair, axis: int, length: int, transform: Callable[[Tensor], Tensor]) -> tuple[Pair, int]:
    """Both parts of the result, and its extent: sums of products of both parts with matrices."""
    unit = torch.eye(length, dtype=torch.complex128)
    matrices = [torch.view_as_real(transform(rows).to(torch.complex128)) for rows in (unit, 1j * unit)]
    found: list[Part] = [None, None]
    for part, numbers in zip(pair, matrices, strict=True):
        if part is not None:
            moved = _moved(at, part, axis)
            for which in (0, 1):
                if numbers[..., which].abs().max() > NOTHING:
                    matrix = at.constant(numbers[..., which].to(moved.meta["val"].dtype))
                    found[which] = at.add(found[which], at.call(aten.matmul.default, moved, matrix))
    return Pair(*(None if part is None else _moved(at, part, axis) for part in found)), matrices[0].shape[1]


def _moved(at: _Writer, x: Any, axis: int) -> Node:
    """Changes places with the last axis."""
    order = list(range(x.meta["val"].dim()))
    order[axis], order[-1] = order[-1], order[axis]
    return x if order == sorted(order) else at.call(aten.permute.default, x, order)


Rule = Callable[[_Writer, Node], "Pair | Node | None"]
OF_MATRICES = {"mm.default": aten.mm.default, "bmm.default": aten.bmm.default, "addmm.default": aten.mm.default}
BOTH = (
    *("clone.default", "cumsum.default", "expand.default", "flip.default", "gather.default", "index.Tensor"),
    *("index_select.default", "mean.default", "mean.dim", "neg.default", "permute.default", "repeat.default"),
    *("select.int", "slice.Tensor", "slice_scatter.default", "split_with_sizes.default", "squeeze.dims"),
    *("sum.dim_IntList", "unsqueeze.default", "view.default"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(BOTH, _both),
    **dict.fromkeys(("add.Tensor", "sub.Tensor"), _sum),
    **dict.fromkeys(("div.Tensor", "reciprocal.default"), _quotient),
    **dict.fromkeys(OF_MATRICES, _matrix_product),
    **dict.fromkeys(("_fft_r2c.default", "_fft_c2r.default", "_fft_c2c.default"), _fourier),
    **dict.fromkeys(("_conj.default", "_conj_physical.default"), _conjugate),
    "_to_copy.default": _copied,
    "abs.default": _size,
    "angle.default": _angle,
    "cat.default": _joined,
    "complex.default": _from_parts,
    "constant_pad_nd.default": _padded,
    "copy.default": _written_over,
    "exp.default": _power_of_e,
    "full_like.default": _of_one_number,
    "getitem": _one_of,
    "mul.Tensor": _product,
    "polar.default": _from_polar,
    "view_as_complex.default": _from_last_axis,
    "view_as_real.default": _to_last_axis,
    "where.self": _where,
}
