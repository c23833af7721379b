"""Targets are found by name or JSON, describe this machine truly, and claim the features their code uses."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from saevit_tvm import backends, targets
from saevit_tvm.support import cpu
from saevit_tvm.support.errors import UsageError
from saevit_tvm.targets import base, llvm
from saevit_tvm.targets.arm import ARM_TARGETS
from saevit_tvm.targets.x86 import WHOLE_VECTORS, X86_TARGETS
from schedules.machines.cpus import isa_of

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="LLVM's names of this architecture")


def test_every_name_resolves() -> None:
    assert targets.names()[0] == "native"
    assert [target.name for target in targets.all_targets()] == targets.names()
    for name in targets.names():
        assert targets.get(name).name == name


@pytest.mark.parametrize(("name", "near"), [("x86-64-v9", "x86-64-v"), ("nativ", "native")])
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown target '{name}': .*did you mean '{near}") as error:
        targets.get(name)
    assert all(known in str(error.value) for known in targets.names())
    assert error.value.exit_status == 2


def test_native_is_this_machine() -> None:
    native = targets.native()
    assert native.arch == platform.machine()
    assert native.tvm["num-cores"] == len(os.sched_getaffinity(0))
    assert set(native.features) <= cpu.features()
    assert backends.runs_here(native) == (True, "runs on this machine")
    assert native.tvm["mcpu"] in native.fingerprint
    assert targets.native() == native


@x86_only
def test_native_assumes_nothing_that_the_kernel_hides() -> None:
    """A virtual machine may hide AVX-512 of a CPU that has it; code with it would be killed."""
    zen4: dict[str, Any] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}
    shown = set(llvm.code_features(zen4)) - {"gfni", "sse4a"}
    without_avx512 = {feature for feature in shown if not feature.startswith("avx512")}
    for here in (shown, without_avx512):
        hidden = llvm.hidden_features(zen4, here)
        assert set(llvm.code_features({**zen4, "mattr": [f"-{name}" for name in hidden]})) == here
    assert hidden == ["avx512f", "gfni", "sse4a"]


@x86_only
@pytest.mark.parametrize("cpu", ["skylake-avx512", "icelake-server", "emeraldrapids", "znver4", "x86-64-v3"])
def test_vectors_of_512_bits_are_not_split(cpu: str) -> None:
    """LLVM would make two of each for Intel's cores, at half the speed."""
    description: dict[str, Any] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": cpu}
    intel = "lake" in cpu or "rapids" in cpu
    assert llvm.splits_vectors(description) == intel
    assert isa_of({**description, "mattr": [WHOLE_VECTORS]}).lanes == (8 if cpu == "x86-64-v3" else 16)
    for target in (targets.native(), *X86_TARGETS):
        assert not llvm.splits_vectors(target.tvm)


@x86_only
@pytest.mark.parametrize("target", X86_TARGETS, ids=lambda target: target.name)
def test_portable_targets_claim_what_llvm_uses(target: base.Target) -> None:
    assert set(target.features) == set(llvm.code_features(target.tvm))


@pytest.mark.parametrize("target", ARM_TARGETS, ids=lambda target: target.name)
def test_boards_claim_what_llvm_uses(target: base.Target) -> None:
    if target.output == "library":
        assert set(target.features) == set(llvm.code_features(target.tvm))


@x86_only
def test_levels_grow() -> None:
    v3, v4 = (set(targets.get(name).features) for name in ("x86-64-v3", "x86-64-v4"))
    assert v3 < v4
    assert "avx512f" in v4 - v3


def test_fingerprints_differ_where_schedules_do() -> None:
    described = [
        {"kind": "llvm"},
        {"kind": "llvm", "mcpu": "x86-64-v3"},
        {"kind": "llvm", "mcpu": "x86-64-v3", "num-cores": 2},
        {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["-fma"]},
    ]
    prints = [targets.get(json.dumps(each)).fingerprint for each in described]
    assert len(set(prints)) == len(prints)
    assert all(name == os.path.basename(name) and " " not in name for name in prints)  # noqa: PTH119


@x86_only
def test_json_target_claims_its_features() -> None:
    plain, nehalem, wide = (
        targets.get(json.dumps({"kind": "llvm", **extra}))
        for extra in ({}, {"mcpu": "nehalem"}, {"mcpu": "x86-64-v3", "mattr": ["+avx512f"]})
    )
    assert plain.features == ()
    assert "sse4_2" in nehalem.features
    assert "avx" not in nehalem.features
    assert "avx512f" in wide.features


@x86_only
@pytest.mark.parametrize(("cpu", "emulator"), [("cortex-a72", "cortex-a72"), ("cortex-a710", "max")])
def test_json_target_of_another_architecture(cpu: str, emulator: str) -> None:
    target = targets.get(json.dumps({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": cpu}))
    assert (target.arch, target.emulator) == ("aarch64", emulator)
    assert "asimd" in target.features and target.linkers == ARM_TARGETS[0].linkers


def test_a_target_for_another_machine_does_not_run_here() -> None:
    other = base.Target("arm64", "", {"kind": "llvm"}, arch="sparc64")
    assert backends.runs_here(other) == (False, f"needs sparc64, this machine is {platform.machine()}")
    newer = base.Target("newer", "", {"kind": "llvm"}, arch=platform.machine(), features=("avx4096",))
    assert backends.runs_here(newer) == (False, "needs CPU features this machine lacks: avx4096")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"kind": "llvm"', "not valid JSON .*at character 15"),
        ("{}", "kind 'None' cannot be built"),
        ('{"kind": "cuda", "arch": "sm_90"}', "kind 'cuda' cannot be built"),
        ('{"kind": ["llvm"]}', "cannot be built"),
        ('{"kind": "llvm", "mtriple": "sparc64-linux-gnu"}', "is for sparc64, and only .*aarch64.* are supported"),
        ('{"kind": "llvm", "mtriple": "aarch64-apple-darwin"}', "is not for Linux: .*'aarch64-linux-gnu'"),
        ('{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "znver4"}', "unknown CPU 'znver4'"),
        ('{"kind": "llvm", "mcpu": "znver5000"}', "unknown CPU 'znver5000'"),
        ('{"kind": "llvm", "mcpu": 3}', "expected type 'str' but got 'int'"),
        ('{"kind": "llvm", "mattr": "+avx"}', "TVM does not take this target: Option 'mattr'"),
        ('{"kind": "llvm", "num-cores": "two"}', "Option 'num-cores'"),
        ('{"kind": "llvm", "colour": "red"}', "Unknown config option 'colour'"),
    ],
)
def test_impossible_json(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        targets.get(text)
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2


def test_portable_targets_need_no_compiler() -> None:
    """Looking up a named target must not pay for importing TVM."""
    script = "import sys; from saevit_tvm import targets; targets.get('x86-64-v3'); print('tvm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
