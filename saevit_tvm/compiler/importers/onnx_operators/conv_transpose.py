"""Transposed convolutions that say how large their result is, which TVM does not read."""

from __future__ import annotations

from typing import Any

from saevit_tvm.compiler.importers.node import Emitter, shape

OPERATORS = ("ConvTranspose",)


def convert(inputs: Any, attributes: dict[str, Any], op: Emitter) -> None:
    """The size in other words, for TVM's own rule: what is cut off at both ends."""
    if "output_shape" not in attributes:
        return
    lengths, kernel = shape(inputs[0])[2:], shape(inputs[1])[2:]
    wanted = attributes.pop("output_shape")[-len(lengths) :]
    ones, zeros = [1] * len(lengths), [0] * len(lengths)
    strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
    whole = [
        step * (length - 1) + extra + dilation * (extent - 1) + 1
        for length, extent, step, dilation, extra in zip(
            lengths, kernel, strides, dilations, attributes.get("output_padding", zeros), strict=True
        )
    ]
    cut = [all_of_it - length for all_of_it, length in zip(whole, wanted, strict=True)]
    if min(cut) < 0:
        raise ValueError("the result is larger than what is written to it")
    smaller, larger = [each // 2 for each in cut], [each - each // 2 for each in cut]
    upper = attributes.pop("auto_pad", b"NOTSET") == b"SAME_UPPER"
    attributes["pads"] = (*smaller, *larger) if upper else (*larger, *smaller)
