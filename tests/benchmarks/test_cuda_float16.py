"""A CUDA target in float16, most of its convolutions on tensor cores, at a batch that no tile divides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from saevit_tvm.runtime import opencl


@pytest.mark.slow
@pytest.mark.skipif(not opencl.available()[0], reason=opencl.available()[1])
def test_it_computes_what_pytorch_computes(script: Callable[[str], Any]) -> None:
    found = script("cuda_float16").compared("saevit_micro", "cuda-sm_90", 17, 32)
    assert found["tensor"] >= 15
    assert 1e-5 < found["deviation"] < found["tolerance"] == 5e-3
