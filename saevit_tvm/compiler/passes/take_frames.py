"""Frames of a camera in place of the model's input: bytes, channels last.

What preprocessing does to every number becomes the beginning of the graph, channels last, so that on a CPU nothing is
moved and one small kernel is all. Resizing and cropping stay outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from saevit_tvm.compiler.passes.rewriting import constant, shape_of
from saevit_tvm.runtime.preprocess import channels_last

TO_CHANNELS_FIRST, TO_CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


@tvm.ir.transform.module_pass(opt_level=0, name="TakeFrames")
class TakeFrames:
    """Put scale, mean, deviation and the change of layout in front of `main`, which takes one image."""

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        mean, deviation = (np.asarray(preprocessing[name], np.float64) for name in ("mean", "std"))
        self.channels_last = channels_last(preprocessing)
        self.factor, self.offset = preprocessing["scale"] / deviation, -mean / deviation

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        main = mod["main"]
        (image,) = main.params
        extents = shape_of(image)
        shape = extents if self.channels_last else tuple(extents[axis] for axis in TO_CHANNELS_LAST)
        frame = relax.Var(image.name, relax.TensorType(shape, "uint8"))
        numbers = relax.op.add(
            relax.op.multiply(relax.op.astype(frame, "float32"), constant(self.factor)), constant(self.offset)
        )
        first, *others = main.body.blocks
        prepared = numbers if self.channels_last else relax.op.permute_dims(numbers, TO_CHANNELS_FIRST)
        begun = [relax.VarBinding(image, prepared), *first.bindings]
        body = relax.SeqExpr([relax.DataflowBlock(begun), *others], main.body.body)
        mod = mod.clone()
        mod["main"] = relax.Function([frame], body, main.ret_ty, attrs=main.attrs)
        return relax.transform.Normalize()(mod)
