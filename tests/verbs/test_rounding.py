"""How far a library in a type of 16 bits may be off: as PyTorch is in that type, and somewhat more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saevit_tvm.models.opening import ModelSource, open_program
from saevit_tvm.proof.parity import Deviation, random_inputs
from saevit_tvm.verbs.build import _holds


class Cancelling(nn.Module):
    """What is left of large numbers, in which short ones are wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 16 + torch.sin(x)) - x * 16


def source_of(net: nn.Module) -> ModelSource:
    return open_program(torch.export.export(net.eval(), (torch.zeros(1, 3, 8, 8),), strict=False))


def test_a_model_that_makes_much_of_roundings_may_be_off_by_as_much() -> None:
    source = source_of(Cancelling())
    inputs = random_inputs(source.library_inputs)
    own = max(source.rounds("float16", each) for each in inputs)
    assert 0.005 < own < 0.05 and source.rounds("float32", inputs[0]) == 0

    def holds(off: float, dtype: str = "float16") -> tuple[bool, dict]:
        manifest = {"dtype": dtype, "verification": {}}
        return _holds(Deviation(off, off), manifest, source, inputs), manifest["verification"]

    assert holds(0.004) == (True, {})
    allowed, proof = holds(1.2 * own)
    assert allowed and proof["original_moves"] == proof["tolerance"] == 1.5 * own
    assert not holds(1.6 * own)[0] and not holds(1.2 * own, "float32")[0]


def test_other_models_stay_within_the_tolerance_of_the_type() -> None:
    source = source_of(nn.Conv2d(3, 4, 3))
    inputs = random_inputs(source.library_inputs)
    assert 0 < source.rounds("float16", inputs[0]) < 0.003
    manifest = {"dtype": "float16", "verification": {}}
    assert not _holds(Deviation(0.006, 0.006), manifest, source, inputs)
    assert _holds(Deviation(0.004, 0.004), manifest, source, inputs)
