"""The most multiply-adds that a core makes in a second, now: a loop that touches registers only."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

CHAINS = 12  # enough to hide the latency of a multiply-add, and few enough for the registers


class Peak:
    """The loop for one target, to be called on one thread; `flops` is its work."""

    def __init__(self, target: dict[str, Any]) -> None:
        import tvm

        from schedules.machines.cpus import isa_of

        isa = isa_of(target)
        func, self.flops = multiply_adds(isa)
        self._kernel = built(func, target)
        self._zero = tvm.runtime.tensor(np.zeros(isa.lanes, np.float32))
        self._result = tvm.runtime.tensor(np.zeros(CHAINS * isa.lanes, np.float32))

    def __call__(self) -> None:
        self._kernel(self._zero, self._result)

    def gflops(self, seconds: float = 0.2) -> float:
        """Of one core, the best of many calls."""
        best, end = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            began = time.thread_time()
            self()
            best = min(best, time.thread_time() - began)
        return 1e-9 * self.flops / best


def built(func: Any, target: dict[str, Any]) -> Any:
    """A kernel's machine code, as something to call."""
    import tvm

    # LLVM does this too, and TVM's takes minutes over a register tile.
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        name = str(func.attrs["global_symbol"])
        return tvm.compile(tvm.IRModule({name: func}), target=tvm.target.Target(target)).jit()[name]


def multiply_adds(isa: Any) -> tuple[Any, int]:
    """A loop of independent multiply-adds in registers, and its work.

    Each adds to what it multiplies, as then no CPU's instruction takes a copy of it.
    """
    from schedules.cpu.builder import Builder

    b, lanes, turns = Builder(), isa.lanes, 200_000
    source, target = b.param("source", (lanes,)), b.param("target", (CHAINS * lanes,))
    sums = [b.cell(f"sum{i}", lanes) for i in range(CHAINS)]
    for total in sums:
        b.store(total, 0, b.splat(1.0, lanes))
    factor = b.bind("factor", b.load(source, 0, lanes))
    with b.loop("turn", turns):
        for total in sums:
            held = b.load(total, 0, lanes)
            b.store(total, 0, held * factor + held)
    for i, total in enumerate(sums):
        b.store(target, i * lanes, b.load(total, 0, lanes))
    return b.function("peak"), 2 * CHAINS * turns * lanes
