"""Constants are folded wherever TVM's own pass would, which looks at every operator by making loops of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_ffi import structural_equal

from saevit_tvm.compiler import street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.passes import FoldConstants
from saevit_tvm.models.opening import open_model

ROW = relax.TensorType((4,), "float32")
Body = Callable[[relax.BlockBuilder, relax.Var], relax.Expr]


def numbers(*values: float) -> relax.Constant:
    return relax.const(np.array(values, "float32"), "float32")


def graph(body: Body) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = relax.Var("x", ROW)
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(body(builder, x))
        builder.emit_func_output(result)
    return builder.get()


def constants_alone(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    return relax.op.add(x, builder.emit(relax.op.add(numbers(1, 2, 3, 4), numbers(1, 1, 1, 1))))


def one_after_the_other(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    total = builder.emit(relax.op.exp(numbers(1, 2, 3, 4)))
    return relax.op.add(x, builder.emit(relax.op.negative(total)))


def several_in_one(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    return relax.op.add(x, builder.emit(relax.op.concat([numbers(1, 2), numbers(3, 4)])))


def only_a_shape(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    return relax.op.add(builder.emit(relax.op.exp(x)), builder.emit(relax.op.full_like(x, relax.const(2.0))))


def nothing_but_its_own_words(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    return relax.op.add(x, builder.emit(relax.op.zeros((4,), "float32")))


def a_shape_by_name(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    shape = builder.emit(relax.ShapeExpr([2, 2]))
    return relax.op.reshape(x, shape)


def loops(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    return relax.op.add(x, builder.emit_te(lambda a: tvm.te.compute(a.shape, lambda i: a[i] * 2), numbers(1, 2, 3, 4)))


def nothing_known(_builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    return relax.op.add(x, numbers(1, 2, 3, 4))


def nothing_used(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    builder.emit(relax.op.exp(x))
    return relax.op.add(x, numbers(1, 2, 3, 4))


BODIES = [constants_alone, one_after_the_other, several_in_one, only_a_shape, nothing_but_its_own_words, loops]
BODIES += [a_shape_by_name, nothing_known, nothing_used]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_it_does_what_tvms_pass_does(body: Body) -> None:
    mod = graph(body)
    folded = FoldConstants()(mod)
    assert structural_equal(folded["main"], relax.transform.FoldConstant()(mod)["main"])
    assert structural_equal(folded["main"], mod["main"]) == (body is nothing_known)


def test_a_model_without_such_operators_needs_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("TVM's pass was asked")

    mod = import_model(open_model("saevit_micro", image_size=64))
    monkeypatch.setattr(relax.transform, "FoldConstant", refuse)
    street.run(mod, street.simplify(), tvm.target.Target("llvm"))
