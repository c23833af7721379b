"""A kernel's text is read as TVM's own parser reads it."""

from __future__ import annotations

import pytest
import tvm
from tvm.script import from_source
from tvm.script import tirx as language

from schedules.gpu.reading import read

TEXT = """
@T.prim_func(private=True, s_tir=True)
def every_word(x_: T.Buffer((4, 16), "float16"), out_: T.Buffer((64,), "float32")):
    T.func_attr({"tirx.noalias": True, "op_pattern": 8})
    x = T.decl_buffer((64,), "float16", data=x_.data)
    out = T.decl_buffer((64,), "float32", data=out_.data)
    for bx in T.thread_binding(4, thread="blockIdx.x"):
        for tx in T.thread_binding(8, thread="threadIdx.x"):
            kept = T.alloc_buffer((4,), "float32", scope="shared")
            T.tvm_storage_sync("shared")
            T.evaluate(T.call_extern("int32", "barrier", 3))
            for i in range(2, 8):
                for j in T.unroll(2):
                    if bx * 8 + tx < 31 and i % 2 == 0 and 3 <= j:
                        kept[j] = T.Cast("float32", x[bx * 8 + tx]) * T.float32(-0.5)
                    else:
                        kept[j] = -kept[j + 1] / T.float32(3)
                if not i > 3 or tx >= 2:
                    for k in T.vectorized(4):
                        out[bx * 16 + tx * 4 // 2 + k] = T.max(kept[k], T.exp(kept[0])) - T.float32(i != 4)
            out[T.Ramp(bx * 4, 1, 4)] = T.if_then_else(tx < 1, kept[T.Ramp(0, 1, 4)], T.Broadcast(T.float32(1), 4))
            x_[bx, tx] = x_[bx, tx + 1]
"""


def test_every_word_of_the_language() -> None:
    expected, found = from_source(TEXT, extra_vars={"T": language}), read(TEXT)
    tvm.ir.assert_structural_equal(found, expected)
    assert found.script() == expected.script()


@pytest.mark.parametrize("other", ["first, second =", "number =", "kept[j] +=", "return"])
def test_what_is_not_of_the_language_is_not_passed_over(other: str) -> None:
    with pytest.raises((AssertionError, SyntaxError, TypeError, ValueError)):
        read(TEXT.replace("kept[j] = -kept", f"{other} -kept"))
