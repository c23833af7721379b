"""What was imported once is not imported again, and what is only alike is."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
from torch import nn
from torch._export import utils

from saevit_tvm.compiler.importers import import_model, quickly
from saevit_tvm.models.opening import ModelSource, _code_digest, open_model

AGAIN = """
import hashlib, sys, tvm
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.models.opening import open_model
mod = import_model(open_model("saevit_micro", image_size=32))
print(hashlib.sha256(tvm.ir.save_json(mod).encode()).hexdigest())
print([name for name in ("torch._dynamo", "torch.export._trace", "tvm.relax.frontend.torch") if name in sys.modules])
"""


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imported"


class Net(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.activation = nn.Conv2d(3, 4, 3), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.layer(x)).mean((2, 3))


def small(folder: Path, activation: nn.Module) -> ModelSource:
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(Net(activation).eval(), (torch.zeros(1, 3, 8, 8),)), path)
    return open_model(str(path))


def digest_of(mod: tvm.IRModule) -> str:
    return hashlib.sha256(tvm.ir.save_json(mod).encode()).hexdigest()


@pytest.fixture(scope="module")
def imported_micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache in which there is the smallest model, and the digest of what was imported."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SAEVIT_TVM_CACHE", str(folder))
        return folder, digest_of(import_model(open_model("saevit_micro", image_size=32)))


@pytest.mark.slow
def test_a_second_import_is_the_same_and_loads_nothing_of_torch_export(imported_micro: tuple[Path, str]) -> None:
    folder, first = imported_micro
    environment = {**os.environ, "SAEVIT_TVM_CACHE": str(folder)}
    done = subprocess.run([sys.executable, "-c", AGAIN], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [first, "[]"]


@pytest.mark.slow
def test_another_seed_or_size_is_another_import(imported_micro: tuple[Path, str], monkeypatch) -> None:
    folder, first = imported_micro
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(folder))
    digests = {first}
    for options in ({"image_size": 32, "seed": 1}, {"image_size": 40}):
        source = open_model("saevit_micro", **options)
        mod = import_model(source)
        assert tuple(int(length) for length in mod["main"].params[0].ty.shape) == source.input_shape
        digests.add(digest_of(mod))
    assert len(digests) == len(list((folder / "imported").iterdir())) == 3


def test_another_graph_with_the_same_weights_in_a_file_of_the_same_name(tmp_path: Path) -> None:
    relu, tanh = small(tmp_path, nn.ReLU()), small(tmp_path, nn.Tanh())
    assert relu.weights_digest == tanh.weights_digest and relu.recipe == tanh.recipe
    assert "tanh" not in str(import_model(relu)) and "tanh" in str(import_model(tanh))


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"x" * 100])
def test_a_damaged_entry_is_imported_anew(tmp_path: Path, kept: Path, damage) -> None:
    source = small(tmp_path, nn.ReLU())
    first = import_model(source)
    (entry,) = kept.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert digest_of(import_model(source)) == digest_of(first)
    assert entry.read_bytes() == whole


def test_what_no_file_defines_is_not_kept(tmp_path: Path, kept: Path) -> None:
    made = type("Made", (Net,), {"__module__": "nowhere"})(nn.ReLU())
    assert _code_digest({}, made) is None and _code_digest({}, Net(nn.ReLU())) is not None


def test_operators_are_looked_for_again_when_one_is_registered() -> None:
    before = quickly.operators_made_of_others()
    library = torch.library.Library("saevit_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
    after = quickly.operators_made_of_others()
    assert after - before == {torch.ops.saevit_test.twice.default} and after == utils._collect_all_valid_cia_ops()
    assert quickly.operators_made_of_others() == after


def rules(ways: dict[Any, Any], context: Any) -> tuple[Any, Any, Any]:
    """What operators have before, within and after: how many rules, and which way of taking them apart."""

    def now() -> list[Any]:
        return [
            (each in quickly.fake_rules, {key: is_ours(rule) for key, rule in each.py_kernels.items()}) for each in ways
        ]

    def is_ours(rule: Any) -> bool:
        return rule in ways.values()

    before = now()
    with context(ways):
        within = now()
    return before, within, now()


def test_rules_that_are_put_back_are_those_that_were_made() -> None:
    op, other = torch.ops.aten.linear.default, torch.ops.aten.layer_norm.default

    def taken_apart(*_args: Any) -> Any:
        return NotImplemented

    def otherwise(*_args: Any) -> Any:
        return NotImplemented

    ways = {op: taken_apart, other: taken_apart}
    made = rules(ways, quickly._override)
    assert made[0] == made[2] != made[1]
    for _ in range(2):
        assert rules(ways, quickly.overridden) == made
    kept = dict(quickly._rules[op].then)
    assert rules({op: otherwise}, quickly.overridden)[1] == made[1][:1]
    assert quickly._rules[op].taken_apart is otherwise and quickly._rules[op].then != kept
    with pytest.raises(KeyError), quickly.overridden(ways):
        raise KeyError
    assert rules(ways, quickly._override) == made
