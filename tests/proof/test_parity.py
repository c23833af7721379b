"""The measure of a deviation, and what a manifest keeps of an answer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from saevit_tvm.proof import parity
from saevit_tvm.runtime.tensors import TensorSpec
from saevit_tvm.support.errors import ParityError


def image(*shape):
    return TensorSpec("input", shape, "float32")


def test_the_stream_of_inputs_is_frozen():
    (first,), (second,) = parity.random_inputs([image(1, 3, 2, 2)], 2)
    assert first.dtype == np.float32 and first.shape == (1, 3, 2, 2)
    assert not np.array_equal(first, second)
    expected = [0.40659213, 0.052268665, 0.53856659]
    assert parity.random_inputs([image(3)], 1, seed=20240229)[0][0].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_error_is_relative_to_the_largest_value_of_an_output():
    large, small = np.array([100.0, -3.0], np.float32), np.array([0.5, 0.1], np.float32)
    deviation = parity.deviation([[large + 0.5, small]], [[large, small]])
    assert deviation.max_abs_error == 0.5 and deviation.max_rel_error == pytest.approx(0.005)
    assert parity.deviation([[small + 0.25]], [[small]]).max_rel_error == 0.5
    assert parity.deviation([[0 * small + 0.25]], [[0 * small]]).max_rel_error == 0.25  # of nothing there is no share


def test_the_worst_of_all_inputs_and_outputs_counts():
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert parity.deviation([[zeros, zeros], [zeros, ones]], [[zeros, zeros], [zeros, zeros]]).max_abs_error == 1


def test_a_half_may_be_the_next_one_and_no_farther():
    """Two sums that differ in their last bit of float32 are rounded to neighbours now and then."""
    expected = np.array([1.0, 3.0, 0.001], np.float16)
    next_ones = np.nextafter(expected, np.float16(9))
    assert parity.deviation([[next_ones]], [[expected]]).is_none
    after_next = np.nextafter(next_ones, np.float16(9))
    found = parity.deviation([[after_next]], [[expected]])
    assert found.max_abs_error == 2 * 2**-9 and not found.within(1e-4)
    single = [expected.astype(np.float32)]
    assert not parity.deviation([[next_ones.astype(np.float32)]], [single]).is_none


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_a_number_never_passes(wrong):
    expected = np.ones(4, np.float32)
    answer = expected.copy()
    answer[2] = wrong
    assert not parity.deviation([[answer]], [[expected]]).within(1e30)
    with pytest.raises(ParityError, match="PyTorch itself"):
        parity.deviation([[expected]], [[answer]])


def test_other_shapes_are_an_error():
    with pytest.raises(ParityError, match=r"\(1, 4\).*\(4,\)"):
        parity.deviation([[np.ones((1, 4), np.float32)]], [[np.ones(4, np.float32)]])


def test_decisions_are_counted_and_few_of_very_many_may_flip():
    places = np.arange(10_000)
    one, many = places.copy(), places.copy()
    one[7], many[:11] = 0, -1
    found = parity.deviation([[one, np.ones(1, np.float32)]], [[places, np.ones(1, np.float32)]])
    assert (found.flipped, found.decisions, found.max_abs_error) == (1, 10_000, 0)
    assert found.within(1e-4) and not found.is_none and "1 of 10000 decisions" in str(found)
    assert not parity.deviation([[many]], [[places]]).within(1e-4)
    assert not parity.deviation([[places[:5] + 1]], [[places[:5]]]).within(1e-4)
    with pytest.raises(ParityError, match=r"int32 of .* PyTorch's are int64"):
        parity.deviation([[places.astype(np.int32)]], [[places]])


def test_recorded_decisions_keep_their_types():
    outputs = [np.array([3, 2**40]), np.array([True, False]), np.array([0.1], np.float16)]
    kept = json.loads(json.dumps(parity.record([outputs])))
    (back,) = parity.recorded({"reference": kept, "outputs": [{"dtype": str(each.dtype)} for each in outputs]})
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(back, outputs, strict=True))


def test_recorded_answers_come_back_to_the_bit():
    outputs = [parity.random_inputs([image(1, 7, 100, 100)], 1)[0][0], np.ones((1, 10), np.float32) / 3]
    kept = json.loads(json.dumps(parity.record([outputs, outputs])))
    assert kept["n"] == 1 and len(kept["outputs"][0][0]) <= parity.RECORDED_VALUES
    (back,) = parity.recorded({"reference": kept, "outputs": [{"dtype": "float32"}] * 2})
    assert all(np.array_equal(a, b) for a, b in zip(back, parity.sample(outputs), strict=True))
    assert np.array_equal(back[1], outputs[1].reshape(-1))


def test_only_what_an_original_may_move_by_is_allowed_beyond_the_tolerance() -> None:
    def allowed(dtype: str | None = None, **said: object) -> float:
        return parity.allowed({"dtype": "float32", "verification": {"passed": True, **said}}, dtype)

    assert allowed() == 1e-4 and allowed("float16") == 5e-3
    assert allowed(original_moves=0.02) == allowed("float16", original_moves=0.02) == 0.02
    assert allowed(original_moves=1e-6) == 1e-4
    for forged in (1e9, float("nan"), -1.0, "0.05", None, [0.05], True):
        assert allowed(original_moves=forged) == 1e-4
