"""What a CPU's vectors are and what its cores do with them are two things."""

from __future__ import annotations

import tvm_ffi

from schedules.cpu import microkernel
from schedules.cpu.primitives.linear import Linear
from schedules.machines.cpus import BIG, NEON, SMALL, isa_of
from schedules.spec import KernelSpec, Tensor

PHONE = {"kind": "llvm", "mtriple": "aarch64-linux-android", "mcpu": "cortex-x4"}


def test_a_core_does_not_change_what_instructions_there_are() -> None:
    """So records of one serve the other."""
    assert isa_of(PHONE) == NEON
    assert isa_of(PHONE).by_lane and isa_of(PHONE).core != NEON.core


def test_a_core_moves_the_best_tile() -> None:
    """A core that loads and multiplies in the same slots wants fewer loads, and so a more even tile."""
    large, small = (microkernel.tiles(isa, 56 * 56, 96) for isa in (isa_of(PHONE), NEON))
    assert set(large) == set(small) and large != small


def test_cycles() -> None:
    assert SMALL.cycles(multiplies=12, loads=4) == 8  # two slots for everything
    assert BIG.cycles(multiplies=12, loads=4) == 6 + 0.02 * 4
    assert SMALL.cycles(multiplies=2, loads=1) == 4, "a sum waits for itself"


def test_loops_that_were_kept_are_those_of_the_core() -> None:
    """Units of two cores are equal, as records serve both; what is generated for one is not for the other."""
    spec = KernelSpec.of("linear", [Tensor("x", (64, 8))], [Tensor("w", (8, 96))], [Tensor("out", (64, 96))])
    linear, units = Linear(), [NEON, isa_of(PHONE)]
    tilings = [linear.default(spec, isa) for isa in units]
    assert tilings[0] != tilings[1]
    for isa, tiling in zip(units, tilings, strict=True):
        kept = linear.generate(spec, isa)
        assert tvm_ffi.structural_equal(kept, linear.generate(spec, isa, tiling), map_free_vars=True)
