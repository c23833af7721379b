"""Attention of any model: softmax(scale * query key + mask) value, however reshapes, scales and masks are written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import tvm
from tvm import relax
from tvm.relax.dpl import is_const, is_op, wildcard

from relay_patterns.epilogue import Chain, chains
from relay_patterns.graph import Graph
from relay_patterns.region import Parts, Reading, add, array, extents, multiply, reading, reshaped, softmax
from relay_patterns.views import viewed, whole
from schedules.spec import FLOAT, KernelSpec

SWAPPED = [0, 2, 1, 3]  # heads and tokens
TURNED = [0, 3, 1, 2]  # heads, width and tokens


class _Pattern:
    def __init__(self) -> None:
        self.parts = {name: wildcard() for name in ("query", "turned", "value", "mask", "more")}
        self.parts |= {name: is_const() for name in ("query_scale", "key_scale", "scale", "infinity")}
        parts = self.parts
        left = multiply(parts["query"], parts["query_scale"]) | parts["query"]
        right = multiply(parts["turned"], parts["key_scale"]) | parts["turned"]
        scores = is_op("relax.matmul")(reshaped(left), reshaped(right))
        scaled = multiply(reshaped(scores), parts["scale"]) | reshaped(scores)
        once = add(scaled, parts["mask"])
        twice = add(reshaped(once), parts["more"])
        plain, safe = softmax(reshaped(twice | once | scaled), parts["infinity"])
        parts |= {"scores": scores, "share": plain, "once": once, "twice": twice}
        self.pattern = is_op("relax.matmul")(reshaped(safe | plain), reshaped(parts["value"]))


_ATTENTION = _Pattern()


def attention(graph: Graph, var: relax.Var) -> Iterator[tuple[relax.Var, Reading]]:
    call = graph.call(var)
    if call is None or call.op != tvm.ir.Op.get("relax.matmul"):
        return
    matched = _ATTENTION.pattern.extract_matched_expr(call, graph.values)
    if matched is not None:
        parts = {name: matched[part] for name, part in _ATTENTION.parts.items() if part in matched}
        for by_head, chain in _endings(graph, var):
            found = _read(graph, parts, var, chain, by_head)
            if found is not None:
                yield from ((chain.result, each) for each in (_by_views(graph, parts, found), found) if each)


def _endings(graph: Graph, var: relax.Var) -> Iterator[tuple[bool, Chain]]:
    """What follows: behind tokens that were put together, where a channel is no longer one of a head; or by head."""
    heads = _by_head(graph, var)
    joined = _by_token_again(graph, heads)
    for chain in chains(graph, joined, extents(joined)[-1], axis=-1) if joined is not None else ():
        if chain.steps and not chain.weights:
            yield False, chain
    yield from ((True, chain) for chain in chains(graph, heads, extents(var)[-1], axis=-1))


def _by_head(graph: Graph, var: relax.Var) -> relax.Var:
    """The result with images and heads apart, which is where what follows begins."""
    shaped = _only_user(graph, var, "reshape")
    return shaped if shaped is not None and extents(shaped)[-2:] == extents(var)[-2:] else var


def _by_token_again(graph: Graph, heads: relax.Var) -> relax.Var | None:
    """Heads side by side in their tokens, if that is all that is made of them."""
    turned = _only_user(graph, heads, "permute_dims")
    if turned is None or [int(axis) for axis in graph.values[turned].attrs.axes or ()] not in (SWAPPED, [1, 0, 2]):
        return None
    shaped = _only_user(graph, turned, "reshape")
    return turned if shaped is None else shaped


def _only_user(graph: Graph, var: relax.Var, op: str) -> relax.Var | None:
    users = graph.users(var)
    call = graph.call(users[0]) if len(users) == 1 and var not in graph.outputs else None
    return users[0] if call is not None and call.op == tvm.ir.Op.get(f"relax.{op}") else None


def _read(graph: Graph, parts: Parts, var: relax.Var, chain: Chain, by_head: bool) -> Reading | None:
    """Query by token, key turned, value by token: of three axes (heads alone) or of four (images and heads)."""
    *lead, tokens, width = extents(parts["query"])
    *_, keys = extents(parts["turned"])
    *_, valued = extents(parts["value"])
    scale, share = _scale(parts), parts["share"]
    fits = (
        len(lead) in (1, 2)
        and extents(parts["turned"]) == (*lead, width, keys)
        and extents(parts["value"]) == (*lead, keys, valued)
        # Reshapes on the way may join images and heads, and nothing else.
        and extents(parts["scores"])[-2:] == (tokens, keys)
        and extents(var)[-2:] == (tokens, valued)
        and int(share.attrs.axis) in (-1, len(extents(share)) - 1)
        and ("infinity" not in parts or bool(np.all(array(parts["infinity"]) == -math.inf)))
    )
    if not fits or scale is None:
        return None
    query, turned, value = (graph.variable(parts[name]) for name in ("query", "turned", "value"))
    axes = len(lead) + 2
    inputs = {"q": _by_token(query, axes), "k": _by_token(turned, axes, turned=True), "v": _by_token(value, axes)}
    batch, heads = lead if len(lead) == 2 else (1, lead[0])
    if not by_head and extents(_by_head(graph, var)) not in ((*lead, tokens, valued), (batch, heads, tokens, valued)):
        return None  # the kernel puts other tokens together
    if "mask" in parts:
        mask = _mask(graph, parts, (batch, heads, tokens, keys))
        if mask is None:
            return None
        inputs["mask"] = mask
    shape, out = extents(chain.result), (batch, tokens, heads, valued)

    def result(found: relax.Expr) -> relax.Expr:
        return relax.op.reshape(relax.op.permute_dims(found, SWAPPED) if by_head else found, shape)

    for name, other in chain.operands.items():
        own = (batch, heads, tokens, valued) if by_head else out
        inputs[name] = _by_token(relax.op.reshape(other, own), axes=4) if by_head else relax.op.reshape(other, own)
    shapes: dict[str, tuple[int, ...]]
    shapes = {"q": (batch, tokens, heads, width), "k": (batch, keys, heads, width), "v": (batch, keys, heads, valued)}
    shapes |= {"mask": extents(inputs["mask"])} if "mask" in inputs else {}
    # What is permuted here has no type yet, so stand-ins have the shapes.
    named = {name: relax.Var(name, relax.TensorType(shapes.get(name, out), FLOAT)) for name in inputs}
    found = reading("attention", named, chain.weights, out, {"scale": scale}, chain.steps, layout="")
    return found._replace(inputs=tuple(inputs.values()), result=result)


def _by_views(graph: Graph, parts: Parts, found: Reading) -> Reading | None:
    """The same where queries, keys or values are parts of other tensors: read there, and not copied out before."""
    given, others = found.spec.inputs[:3], found.spec.inputs[3:]
    views = []
    for part, tensor, own in zip(("query", "turned", "value"), given, found.inputs, strict=False):
        arrange = partial(_tokens, order=TURNED if part == "turned" else SWAPPED)
        view = viewed(graph, graph.variable(parts[part]), arrange, scaled=part == "query")
        views.append(view or whole(own, tensor.shape))
    if all(view.is_whole(tensor.shape) for view, tensor in zip(views, given, strict=True)):
        return None
    _, keys, _, width = given[1].shape
    attrs = {"keys": keys, "width": width, "views": [(view.offset, *view.strides[:-1]) for view in views]}
    attrs["scale"] = found.spec["scale"] * math.prod(view.factor for view in views)
    bases = [replace(tensor, shape=view.shape) for tensor, view in zip(given, views, strict=True)]
    spec = found.spec
    spec = KernelSpec.of(spec.op, [*bases, *others], spec.weights, spec.outputs, attrs, spec.epilogue.steps)
    inputs = (*(view.base for view in views), *found.inputs[3:])
    return found._replace(spec=spec, inputs=inputs, begins=found.inputs)


def _tokens(heads: np.ndarray, order: list[int]) -> np.ndarray:
    """[images, tokens, heads, width], as `_by_token` has it."""
    return (heads if heads.ndim == 4 else heads[np.newaxis]).transpose(order)


def _mask(graph: Graph, parts: Parts, whole: tuple[int, ...]) -> relax.Expr | None:
    """What is added to the scores, of four axes: one tensor, or constants, two of which are added up."""
    masks = [(parts["mask"], extents(parts["once"]))]
    masks += [(parts["more"], extents(parts["twice"]))] if "more" in parts else []
    if len(masks) == 1 and not _constant(parts["mask"]):
        mask = extents(parts["mask"])
        fits = len(mask) == 4 and all(a in (1, b) for a, b in zip(mask, whole, strict=True))
        return graph.variable(parts["mask"]) if fits else None
    if not all(_constant(mask) for mask, _ in masks):
        return None
    total = np.zeros((), np.float32)
    for mask, shape in masks:
        total = total + _of_four_axes(array(mask), shape, whole)
    return relax.const(total)


def _constant(expr: relax.Expr) -> bool:
    return isinstance(expr, tvm.ir.GenericConst)


def _of_four_axes(mask: np.ndarray, shape: tuple[int, ...], whole: tuple[int, ...]) -> np.ndarray:
    """A mask that is added to scores of some shape, for the same scores by image, head, query and key."""
    mask = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    if mask.shape[:-2] == (1,) * (len(shape) - 2):
        return mask.reshape(1, 1, *mask.shape[-2:])
    if shape == whole:
        return mask
    return np.broadcast_to(mask, shape).reshape(whole)


def _by_token(data: relax.Expr, axes: int, turned: bool = False) -> relax.Expr:
    """[images, tokens, heads, width], from heads before tokens; a key that is turned is turned back."""
    whole = data if axes == 4 else relax.op.expand_dims(data, 0)
    return relax.op.permute_dims(whole, TURNED if turned else SWAPPED)


def _scale(parts: Parts) -> float | None:
    """What all factors come to; None when one of them is not a number."""
    factors = [array(parts[name]) for name in ("query_scale", "key_scale", "scale") if name in parts]
    return math.prod((each.item() for each in factors), start=1.0) if all(each.size == 1 for each in factors) else None
