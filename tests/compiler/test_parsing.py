"""TVM's parser sees the stack as Python shows it."""

from __future__ import annotations

import inspect

import tvm
from tvm.script import ir as I
from tvm.script import tirx as T
from tvm.tirx.script.parser import entry

from saevit_tvm.compiler import parsing, street


def test_the_stack_is_pythons() -> None:
    ours, pythons = parsing.stack(), inspect.stack()
    assert ours[0].function == "test_the_stack_is_pythons" and ours[0].lineno == pythons[0].lineno
    for one, other in zip(ours, pythons, strict=True):
        assert one.frame is other.frame and one.function == other.function and one.code_context == other.code_context


def test_a_module_and_its_functions_are_parsed() -> None:
    assert entry.inspect.stack is parsing.stack and street.parsing is parsing

    @I.ir_module
    class Module:
        @T.prim_func
        def main(a: T.Buffer((4,), "float32")):
            for i in range(4):
                a[i] = 1.0

    assert isinstance(Module["main"], tvm.tirx.PrimFunc)
