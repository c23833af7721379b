"""What every kernel's share is a share of: a loop that does nothing but multiply and add."""

from __future__ import annotations

import re

import pytest
import tvm

from schedules.machines.cpus import isa_of

X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
RPI5 = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}
COUNTING = r"(add|sub|dec|inc|cmp|j|b\.)"  # the turns, and back to where the loop begins


@pytest.mark.parametrize(
    ("target", "multiply"),
    [
        ({**X86, "mcpu": "x86-64-v3"}, r"vfmadd\w+ps\s+%ymm"),
        ({**X86, "mcpu": "x86-64-v4"}, r"vfmadd\w+ps\s+%[yz]mm"),
        (RPI5, r"fmla\s+v\d+\.4s"),
    ],
    ids=["x86-64-v3", "x86-64-v4", "rpi5"],
)
def test_the_peak_is_that_of_multiply_adds_in_registers(script, target, multiply):
    peak = script("peak")
    func, _ = peak.multiply_adds(isa_of(target))
    text = tvm.compile(tvm.IRModule({"peak": func}), target=tvm.target.Target(target)).mod.inspect_source("asm")
    blocks = re.split(r"\n\.LBB\w+:", re.sub(r"\n\.Ltmp\d+:", "", text))
    inner = max(blocks, key=lambda block: len(re.findall(multiply, block)))
    lines = [line.strip() for line in inner.splitlines() if line.startswith("\t")]
    turn = lines[: 1 + next(index for index, line in enumerate(lines) if re.match(r"j|b\.", line))]
    others = [line for line in turn if not re.match(multiply, line)]
    assert all(re.match(COUNTING, line) for line in others), others
    assert len(turn) > len(others) and (len(turn) - len(others)) % peak.CHAINS == 0
