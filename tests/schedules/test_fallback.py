"""What has no generator: element-wise work goes by rows where these are read in even steps, and computes the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import te, tirx, topi
from tvm.s_tir import dlight

from saevit_tvm.targets import native
from schedules.cpu.fallback import Fallback

A, B, ROW = ((2, 3, 5, 40), (2, 3, 5, 27), (1, 1, 1, 40))


def sliced(x: Any, low: int, high: int) -> Any:
    return topi.strided_slice(x, [0, 0, 0, low], [2, 3, 5, high], [1, 1, 1, 1])


def scheduled(*stages: Any) -> tvm.tirx.PrimFunc:
    func = te.create_prim_func(list(stages)).with_attr("global_symbol", "kernel")
    with tvm.target.Target(native().tvm):
        return dlight.ApplyDefaultSchedule(Fallback())(tvm.IRModule({"kernel": func}))["kernel"]


# What is computed with TVM's operators, and by numpy; of what shapes; in how many parts a row is.
JOINED, SQUARES = 0, -1  # rows are one; parts of some rows are written together
CASES: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray], tuple[tuple[int, ...], ...], int]] = {
    "concatenation": (lambda a, b: topi.concatenate([a, b], 3), lambda a, b: np.concatenate([a, b], 3), (A, B), 5),
    "and a sum": (
        lambda a, b, c: topi.add(topi.concatenate([a, b], 3), c),
        lambda a, b, c: np.concatenate([a, b], 3) + c,
        (A, B, (1, 1, 5, 67)),
        5,
    ),
    "and an activation": (
        lambda a, b: topi.nn.leaky_relu(topi.concatenate([a, b], 3), 0.5),
        lambda a, b: (lambda x: np.where(x > 0, x, x * np.float32(0.5)))(np.concatenate([a, b], 3)),
        (A, B),
        5,
    ),
    "of other rows": (lambda a, b: topi.concatenate([a, b], 2), lambda a, b: np.concatenate([a, b], 2), (A, A), 3),
    "a part that is changed": (
        lambda a, b: topi.concatenate([topi.add(sliced(a, 0, 27), b), sliced(a, 27, 40)], 3),
        lambda a, b: np.concatenate([a[..., :27] + b, a[..., 27:]], 3),
        (A, B),
        3,
    ),
    "factors by channel": (topi.multiply, np.multiply, (A, ROW), 3),
    "one factor": (topi.multiply, np.multiply, (A, ()), 3),
    "one row": (topi.multiply, np.multiply, ((1, 40), (40,)), 3),
    "a border": (
        lambda a: topi.nn.pad(a, (0, 1, 0, 0), (0, 0, 2, 0), 7.0),
        lambda a: np.pad(a, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=7.0),
        (A,),
        3,
    ),
    "a slice": (lambda a: sliced(a, 3, 20), lambda a: a[..., 3:20], (A,), 2),
    "in the same places": (
        lambda a, b: topi.nn.relu(topi.add(a, b)),
        lambda a, b: np.maximum(a + b, 0),
        (A, A),
        JOINED,
    ),
    "rows that were columns": (
        lambda a: topi.transpose(a, (0, 3, 1, 2)),
        lambda a: a.transpose(0, 3, 1, 2),
        ((2, 3, 20, 40),),
        SQUARES,
    ),
    "rows of no even length that were columns": (
        lambda a: topi.transpose(a, (0, 3, 1, 2)),
        lambda a: a.transpose(0, 3, 1, 2),
        ((2, 3, 23, 40),),
        2,
    ),
    "columns with numbers behind": (
        lambda a: topi.transpose(topi.nn.pad(a, (0, 0, 0), (0, 4, 0), 1.0), (0, 2, 1)),
        lambda a: np.pad(a, ((0, 0), (0, 4), (0, 0)), constant_values=1).transpose(0, 2, 1),
        ((2, 20, 40),),
        3,
    ),
    "columns with numbers beside": (
        lambda a: topi.transpose(topi.nn.pad(a, (0, 0, 0), (0, 0, 1), 1.0), (0, 2, 1)),
        lambda a: np.pad(a, ((0, 0), (0, 0), (0, 1)), constant_values=1).transpose(0, 2, 1),
        ((1, 20, 40),),
        SQUARES,
    ),
    "a view of rows with numbers behind": (
        lambda a: topi.reshape(
            topi.transpose(topi.nn.pad(a, (0, 0, 0, 0), (0, 0, 0, 1), 1.0), (0, 2, 1, 3)), (10, 3, 17)
        ),
        lambda a: (
            np.pad(a, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1).transpose(0, 2, 1, 3).reshape(10, 3, 17)
        ),
        ((2, 3, 5, 16),),
        2,
    ),
    "short rows that were columns": (
        lambda a: topi.transpose(topi.reshape(a, (6, 5, 40)), (0, 2, 1)),
        lambda a: a.reshape(6, 5, 40).transpose(0, 2, 1),
        ((2, 3, 5, 40),),
        JOINED,
    ),
    "rows of a view that were columns": (
        lambda a: topi.transpose(topi.reshape(a, (6, 20, 40)), (0, 2, 1)),
        lambda a: a.reshape(6, 20, 40).transpose(0, 2, 1),
        ((2, 3, 20, 40),),
        SQUARES,
    ),
    "diagonals": (
        lambda a: te.compute((2, 40), lambda i, j: a[i, j, j]),
        lambda a: a[:, range(40), range(40)],
        ((2, 40, 40),),
        3,
    ),
    "each three times": (
        lambda a: te.compute((40, 40), lambda i, j: a[j, i, j // 3]),
        lambda a: np.array([[a[j, i, j // 3] for j in range(40)] for i in range(40)]),
        ((40, 40, 14),),
        JOINED,
    ),
    "rows of parts of rows": (
        lambda a: topi.reshape(topi.transpose(a, (0, 2, 1, 3)), (2, 5, 120)),
        lambda a: a.transpose(0, 2, 1, 3).reshape(2, 5, 120),
        (A,),
        JOINED,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_numpy_does(name: str, call: Callable[..., np.ndarray]) -> None:
    by_tvm, by_numpy, shapes, parts = CASES[name]
    given = [te.placeholder(shape, name=f"x{at}") for at, shape in enumerate(shapes)]
    func = scheduled(*given, by_tvm(*given))
    random = np.random.default_rng(0)
    values = [random.standard_normal(shape, "float32") for shape in shapes]
    expected = by_numpy(*values)
    np.testing.assert_array_equal(call(func, values, expected.shape), expected)
    assert func.script().count("T.vectorized") == max(parts, 1)
    assert ("_fused_0" in func.script()) == (parts == JOINED)  # all loops in one, which is cut
    assert bool(re.search(r"_0_fused.*\n +for \w+ in range\(4[01]\):\n.*vectorized", func.script())) == (
        parts == SQUARES
    )


def decided(by: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """What is a number or its negative, as is decided by its row and its place in the row."""
    x = te.placeholder((4, 24), name="x")
    return x, te.compute((4, 24), lambda i, j: te.if_then_else(by(i, j), x[i, j], -x[i, j]))


NINE = {
    "j < 9": lambda _i, j: j < 9,
    "j <= 8": lambda _i, j: j <= 8,
    "j > 8": lambda _i, j: j > 8,
    "j >= 9": lambda _i, j: j >= 9,
    "9 <= j": lambda _i, j: tirx.LE(tirx.const(9), j),
    "8 < j": lambda _i, j: tirx.LT(tirx.const(8), j),
    "9 > j": lambda _i, j: tirx.GT(tirx.const(9), j),
    "8 >= j": lambda _i, j: tirx.GE(tirx.const(8), j),
}


@pytest.mark.parametrize("name", NINE)
def test_a_row_is_cut_where_it_is_decided(name: str, call: Callable[..., np.ndarray]) -> None:
    func = scheduled(*decided(NINE[name]))
    assert re.findall(r"T.vectorized\((.*)\)", func.script()) == ["9", "9, 24"]
    value = np.arange(96, dtype="float32").reshape(4, 24)
    expected = np.where([eval(name, {"j": j}) for j in range(24)], value, -value)
    np.testing.assert_array_equal(call(func, [value], (4, 24)), expected)


def test_where_no_number_decides_rows_are_joined(call: Callable[..., np.ndarray]) -> None:
    func = scheduled(*decided(lambda i, j: j < i))
    assert "_fused_0" in func.script()
    value = np.arange(96, dtype="float32").reshape(4, 24)
    expected = np.where(np.arange(24) < np.arange(4)[:, None], value, -value)
    np.testing.assert_array_equal(call(func, [value], (4, 24)), expected)


def test_bounds_outside_a_row_are_none() -> None:
    func = scheduled(*decided(lambda _i, j: tirx.And(j < 99, j >= -3)))
    assert re.findall(r"T.vectorized\((.*)\)", func.script()) == ["16", "16, 24"]


def greatest(x: Any) -> Any:
    """With what is not a number above all, which is no reduction that TVM knows."""
    over = te.reduce_axis((0, x.shape[1]))
    above = te.comm_reducer(lambda a, b: tirx.if_then_else(tirx.Or(a > b, a != a), a, b), tirx.min_value)
    return te.compute(x.shape[:1], lambda i: above(x[i, over], axis=over))


# What is reduced with TVM's operators, and by numpy; of what shape; how many results there are before the last.
REDUCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray], tuple[int, ...], int]] = {
    "a sum": (lambda a: topi.sum(a, 2), lambda a: a.sum(2), (3, 5, 196), 28),
    "of squares": (
        lambda a: topi.sum(topi.multiply(a, a), 2, True),
        lambda a: (a * a).sum(2, keepdims=True),
        (3, 5, 64),
        32,
    ),
    "a long one": (lambda a: topi.sum(a, 1), lambda a: a.sum(1), (7, 1024), 64),
    "of two axes": (lambda a: topi.sum(a, (1, 2)), lambda a: a.sum((1, 2)), (3, 5, 48), 24),
    "the greatest": (lambda a: topi.max(a, 1), lambda a: a.max(1), (7, 24), 12),
    "the greatest of others": (greatest, lambda a: a.max(1), (7, 24), 0),
    "the least": (lambda a: topi.min(a, 1), lambda a: a.min(1), (7, 8), 4),
    "and a root": (lambda a: topi.sqrt(topi.sum(topi.abs(a), 1)), lambda a: np.sqrt(abs(a).sum(1)), (7, 200), 40),
    "of a prime number": (lambda a: topi.sum(a, 1), lambda a: a.sum(1), (7, 199), 0),
    "of few": (lambda a: topi.sum(a, 1), lambda a: a.sum(1), (7, 4), 0),
    "the greatest's place": (lambda a: topi.argmax(a, 1), lambda a: a.argmax(1).astype("int32"), (7, 64), 0),
    "of all": (lambda a: topi.sum(a, (0, 1)), lambda a: a.sum(), (7, 64), 0),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_it_reduces_as_numpy_does(name: str, call: Callable[..., np.ndarray]) -> None:
    by_tvm, by_numpy, shape, lanes = REDUCTIONS[name]
    given = te.placeholder(shape, name="x")
    func = scheduled(given, by_tvm(given))
    value = np.random.default_rng(0).standard_normal(shape, "float32")
    expected = np.asarray(by_numpy(value.astype("float64")))
    found = call(func, [value], expected.shape)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
    assert ("_rf" in func.script()) == bool(lanes)
    assert not lanes or re.findall(r"T.vectorized\((\d+)\)", func.script())[:2] == [str(lanes)] * 2


# What LLVM would call the C library for; by PyTorch, as numpy has not all of them.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "exp": (tirx.exp, torch.exp),
    "sigmoid": (tirx.sigmoid, torch.sigmoid),
    "tanh": (tirx.tanh, torch.tanh),
    "erf": (tirx.erf, torch.erf),
    "silu": (lambda x: x * tirx.sigmoid(x), torch.nn.functional.silu),
    "one of another": (lambda x: tirx.exp(tirx.tanh(x)), lambda x: torch.exp(torch.tanh(x))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_numbers_go_by_vectors(name: str, call: Callable[..., np.ndarray], assembly: Any) -> None:
    """Within rounding of what is right, and at the ends of what there is exactly that."""
    ours, by_torch = FUNCTIONS[name]
    x = te.placeholder((4, 64), name="x")
    func = scheduled(x, te.compute(x.shape, lambda i, j: ours(x[i, j])))
    ends = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 88.8, -200.0, 1e-30]
    value = np.concatenate([ends, np.linspace(-12, 12, 200), np.linspace(-1e-3, 1e-3, 46)]).astype("float32")
    expected = by_torch(torch.from_numpy(value).double()).float().numpy()
    found = call(func, [value.reshape(4, 64)], (4, 64)).ravel()
    assert np.array_equal(found[2:9], expected[2:9], equal_nan=True)
    np.testing.assert_allclose(found, expected, 5e-7, 4e-7)
    assert not re.search(r"call\w*\s+(expf|tanhf|erff)", assembly(func, native().tvm))


def test_functions_of_other_numbers_are_left(call: Callable[..., np.ndarray]) -> None:
    x = te.placeholder((4, 8), "float64", name="x")
    func = scheduled(x, te.compute(x.shape, lambda i, j: tirx.exp(x[i, j])))
    value = np.linspace(-700, 700, 32).reshape(4, 8)
    np.testing.assert_allclose(call(func, [value], (4, 8)), np.exp(value), 1e-14)
