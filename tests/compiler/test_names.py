"""Kernels have names that a file can have."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from saevit_tvm.compiler.passes.shorten_names import LONGEST
from saevit_tvm.compiler.street import operators


def test_kernels_of_many_operators_have_short_names() -> None:
    """Two of them begin alike."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType([3, 4], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            value = x
            for last in (relax.op.cos, relax.op.sin):
                value = builder.emit(relax.op.matmul(value, relax.const(np.ones((4, 4), "float32"))))
                for _ in range(20):
                    value = builder.emit(relax.op.add(value, relax.const(0.5)))
                value = builder.emit(last(value))
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    plain = builder.get()
    mod = tvm.transform.Sequential(operators())(plain)
    names = [var.name_hint for var in mod.get_global_vars()]
    assert len(names) > 2 and max(map(len, names)) <= LONGEST + 2
    given = tvm.runtime.tensor(np.random.RandomState(0).standard_normal((3, 4)).astype("float32"))
    answers = [
        relax.VirtualMachine(relax.build(each, tvm.target.Target("llvm")), tvm.cpu())["main"](given).numpy()
        for each in (plain, mod)
    ]
    np.testing.assert_allclose(*answers, rtol=1e-6)
