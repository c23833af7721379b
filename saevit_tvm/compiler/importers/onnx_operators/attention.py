"""Attention as ONNX has it since opset 23. onnxruntime's own operator of this name knows its heads by another word."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from saevit_tvm.compiler.importers.node import Emitter, dtype, shape

OPERATORS = ("Attention",)
PLACES = 4  # [batch, heads, tokens, channels]


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> relax.Expr | None:
    if "num_heads" in attributes:
        return None
    if attributes["tvm_custom"]["num_outputs"] > 1 or any(each is not None for each in (inputs[4], inputs[5])):
        raise ValueError("keys and values of earlier tokens, and shares as an output, have no rule")
    heads = attributes.get("q_num_heads"), attributes.get("kv_num_heads")
    query, key, value = (
        _in_heads(op, each, count) for each, count in zip(inputs[:3], (heads[0], heads[1], heads[1]), strict=True)
    )
    alike = shape(query)[1] // shape(key)[1]
    if alike > 1:  # heads that look at the same keys
        key, value = (op.repeat(each, alike, axis=1) for each in (key, value))
    mask = _mask(op, inputs[3], shape(query)[2], shape(key)[2], dtype(query), bool(attributes.get("is_causal", 0)))
    scale = attributes.get("scale") or 1 / math.sqrt(shape(query)[3])
    found = attended(op, query, key, value, mask, scale, attributes.get("softcap", 0.0))
    return found if len(shape(inputs[0])) == PLACES else together(op, found)


def attended(
    op: Emitter,
    query: relax.Expr,
    key: relax.Expr,
    value: relax.Expr,
    mask: relax.Expr | None,
    scale: float,
    cap: float = 0.0,
) -> relax.Expr:
    def number(value: float) -> relax.Expr:
        return relax.const(value, dtype(query))

    scores = op.multiply(op.matmul(query, op.permute_dims(key, [0, 1, 3, 2])), number(scale))
    if cap:
        scores = op.multiply(op.tanh(op.divide(scores, number(cap))), number(cap))
    scores = scores if mask is None else op.add(scores, mask)
    return op.matmul(op.nn.softmax(scores, axis=-1), value)


def _in_heads(op: Emitter, x: relax.Expr, heads: int | None) -> relax.Expr:
    return x if len(shape(x)) == PLACES else apart(op, x, heads or 1)


def apart(op: Emitter, x: relax.Expr, heads: int) -> relax.Expr:
    """[batch, tokens, channels of all heads] in heads."""
    batch, tokens, channels = shape(x)
    return op.permute_dims(op.reshape(x, [batch, tokens, heads, channels // heads]), [0, 2, 1, 3])


def together(op: Emitter, x: relax.Expr) -> relax.Expr:
    batch, heads, tokens, channels = shape(x)
    return op.reshape(op.permute_dims(x, [0, 2, 1, 3]), [batch, tokens, heads * channels])


def _mask(
    op: Emitter, given: relax.Expr | None, queries: int, keys: int, wanted: str, causal: bool
) -> relax.Expr | None:
    """What is added to the scores; a token that is not to be seen has minus infinity."""
    if given is not None and dtype(given) == "bool":
        given = op.where(given, relax.const(0.0, wanted), relax.const(-math.inf, wanted))
    if not causal:
        return given
    earlier = np.where(np.tri(queries, keys, dtype=bool), 0.0, -math.inf)
    later = relax.const(earlier, wanted)
    return later if given is None else op.add(given, later)
