"""A kernel is compiled once, by itself, and nothing else is taken for what was kept of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_ffi import structural_hash

from saevit_tvm import backends, targets
from saevit_tvm.compiler import kernels, street
from saevit_tvm.models.opening import open_model
from schedules.cpu import registry
from schedules.cpu.generator import MADE_FROM, made_from
from schedules.machines.cpus import AVX2, AVX512, SMALL, Isa
from schedules.spec import KernelSpec, Tensor

TARGET = targets.native()
VECTOR = relax.TensorType((8,), "int32")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAEVIT_TVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / kernels.KIND


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def loops(factor: int, offset: int, result: str = "y") -> tvm.tirx.PrimFunc:
    source = f"""
@T.prim_func(private=True, s_tir=True)
def scaled(x: T.Buffer((8,), "int32"), {result}: T.Buffer((8,), "int32")):
    for i in range(8):
        {result}[i] = x[i] * {factor} + {offset}
"""
    return tvm.script.from_source(source, extra_vars={"T": tvm.script.tirx})


def answer(**called: tvm.tirx.PrimFunc) -> list[int]:
    """What the kernels, called one after the other, make of 0 to 7."""
    builder = relax.BlockBuilder()
    value = start = relax.Var("start", VECTOR)
    with builder.function("main", [start]):
        for name, kernel in called.items():
            value = builder.emit(relax.call_tir(builder.add_func(kernel, name), [value], VECTOR))
        builder.emit_func_output(value)
    mod = street.run(builder.get(), street.virtual_machine(), tvm.target.Target(TARGET.tvm))
    machine = relax.VirtualMachine(kernels.executable(mod, TARGET), tvm.cpu())
    return list(machine["main"](tvm.runtime.tensor(np.arange(8, dtype="int32"))).numpy())


def test_equal_loops_may_have_two_names(folder: Path) -> None:
    for name in ("one", "two", "one"):
        assert answer(**{name: loops(3, 1)}) == [3 * x + 1 for x in range(8)]
    assert len(names(folder)) == 2
    assert answer(one=loops(3, 1), two=loops(5, 2)) == [15 * x + 7 for x in range(8)]
    assert len(names(folder)) == 3


def test_names_of_arguments_are_part_of_a_kernel(folder: Path) -> None:
    """TVM says them of wrong arguments."""
    answer(one=loops(3, 1))
    answer(one=loops(3, 1, result="z"))
    assert len(names(folder)) == 2


@pytest.mark.slow
def test_other_loops_are_not_taken_for_these(folder: Path) -> None:
    """For TVM's structural hash some of them are the same."""
    seen: dict[int, tuple[int, int]] = {}
    for numbers in [(factor, offset) for factor in range(2, 20) for offset in range(1, 100)]:
        first = seen.setdefault(structural_hash(loops(*numbers)), numbers)
        if first != numbers:
            break
    for factor, offset in (first, numbers):
        assert answer(one=loops(factor, offset)) == [factor * x + offset for x in range(8)]
    assert len(names(folder)) == 2


def generated(width: int = 8, isa: Isa = AVX2, threads: int = 1) -> tvm.tirx.PrimFunc:
    spec = KernelSpec.of("linear", [Tensor("x", (1, width))], [Tensor("w", (width, 4))], [Tensor("y", (1, 4))])
    made_by = registry.generator(spec, isa)
    assert made_by is not None
    return made_by.generate(spec, isa, threads=threads)


def test_of_loops_as_they_were_made_their_origin_is_told() -> None:
    key = partial(kernels._key, "linear", target=TARGET, settings={})
    one = generated()
    assert made_from(one) and key(kernel=one) == key(kernel=generated())
    others = [generated(16), generated(threads=2), generated(isa=AVX512), generated(isa=replace(AVX2, core=SMALL))]
    assert len({key(kernel=each) for each in (one, *others)}) == 5
    assert key(kernel=one.with_attr("global_symbol", "linear")) == key(kernel=one)


def test_of_loops_that_were_changed_every_word_is_told() -> None:
    one = generated()
    body = tvm.tirx.SeqStmt([one.body, tvm.tirx.Evaluate(0)])
    changed = tvm.tirx.PrimFunc(one.params, body, attrs=one.attrs)
    assert changed.attrs[MADE_FROM] == one.attrs[MADE_FROM] and made_from(changed) is None
    assert kernels._key("linear", changed, TARGET, {}) != kernels._key("linear", one, TARGET, {})
    assert made_from(loops(3, 1)) is None


def test_what_is_kept_is_not_compiled_again(folder: Path) -> None:
    answer(one=loops(3, 1))
    (first,) = folder.iterdir()
    answer(one=loops(5, 2))
    (second,) = set(folder.iterdir()) - {first}
    first.write_bytes(second.read_bytes())
    assert answer(one=loops(3, 1)) == [5 * x + 2 for x in range(8)]


def test_what_is_damaged_is_compiled_anew(folder: Path) -> None:
    answer(one=loops(3, 1))
    (place,) = folder.iterdir()
    whole = place.read_bytes()
    place.write_bytes(whole[:-1])
    assert answer(one=loops(3, 1)) == [3 * x + 1 for x in range(8)]
    assert place.read_bytes() == whole


@pytest.mark.slow
def test_other_weights_need_no_compiler(folder: Path, tmp_path: Path) -> None:
    def library(seed: int) -> bytes:
        source = open_model("saevit_micro", image_size=32, seed=seed)
        backends.compile_model(source, TARGET).export(tmp_path / "library.so")
        return (tmp_path / "library.so").read_bytes()

    first = library(seed=0)
    kept = names(folder)
    assert len(kept) == 18
    assert library(seed=1) != first
    assert names(folder) == kept
    for path in sorted(folder.iterdir())[:3]:
        path.unlink()
    assert library(seed=0) == first  # whether kernels were kept or compiled anew
    assert names(folder) == kept
