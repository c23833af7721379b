"""GFLOP/s of every generated kernel of a model, beside the multiply-add peak measured at the same moment.

    python benchmarks/kernels.py [--model saevit_xs] [--only REGEX] [--threads 1] [--seconds 0.3]

Clock speeds move, so each kernel alternates with a loop of multiply-adds that touches registers only; the share of
the peak is what to compare between runs. Times are CPU time of the calling thread when there is one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from command_line import parsed

SHORT = "--model saevit_micro --image-size 32 --seconds 0.01"
DIMS = {
    "saevit_micro": ((16, 32, 48, 64), (1, 1, 1, 1)),
    "saevit_xs": ((48, 96, 192, 320), (1, 2, 4, 2)),
    "saevit_s": ((48, 96, 240, 384), (1, 2, 6, 2)),
}
RATES = (8, 4, 2, 1)
HEAD_WIDTH = 16
CHAINS = 12  # enough to hide the latency of a multiply-add, and few enough for the registers


@dataclass(frozen=True)
class Case:
    """One kernel: its generator's name, its shape, its random weights, how often the network calls it."""

    name: str
    family: str
    shape: Any
    weights: dict[str, np.ndarray]
    calls: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="saevit_xs", choices=sorted(DIMS))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--only", default="", help="a regular expression over kernel names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="how long to measure each kernel")
    parser.add_argument("--target", default="", help="a TVM target as JSON instead of this machine's")
    parser.add_argument("--tiling", default="{}", help='knobs that replace the default ones, as JSON: {"chunk": 14}')
    options = parsed(parser, SHORT, kept=False)
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    from saevit_tvm.targets import native
    from schedules.machines.cpus import isa_of

    target = json.loads(options.target) if options.target else native().tvm
    bench = Bench(target, isa_of(target), options.threads, options.seconds, json.loads(options.tiling))
    print(f"{'kernel':24} {'calls':>5} {'ms':>8} {'GFLOP/s':>8} {'peak':>7} {'share':>6} {'error':>8} {'build s':>8}")
    rows = []
    for case in cases(options.model, options.image_size):
        if re.search(options.only, case.name):
            rows.append(bench.row(case))
            print(_line(rows[-1]), flush=True)
            (options.out / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
    total = sum(row["calls"] * row["ms"] for row in rows)
    ideal = sum(row["calls"] * row["ms"] * row["share"] for row in rows)
    print(f"{'sum over the network':24} {'':5} {total:8.3f} ms; at the peak it would be {ideal:.3f} ms")


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['kernel']:24} {row['calls']:5} {row['ms']:8.3f} {row['gflops']:8.1f} {row['peak_gflops']:7.1f} "
        f"{100 * row['share']:5.1f}% {row['error']:8.1e} {row['build_seconds']:8.2f}"
    )


def cases(model: str, image_size: int = 224) -> list[Case]:
    """Every kernel of the network, largest map first."""
    from schedules.cpu.fused import ciffn, dwsconv, head
    from schedules.cpu.primitives.conv import ConvShape
    from schedules.saa_shape import SAAShape
    from schedules.spec import Epilogue

    dims, depths = DIMS[model]
    rng = np.random.RandomState(0)
    found: list[Case] = []

    def add(name: str, family: str, shape: Any, calls: int, **weights: tuple[int, ...]) -> None:
        made = {key: (rng.randn(*size) / max(size[0], 1) ** 0.5).astype(np.float32) for key, size in weights.items()}
        found.append(Case(name, family, shape, made, calls))

    def down(name: str, size: int, c: int, k: int, *steps: str) -> None:
        shape = ConvShape(1, size, size, c, (3, 3), (2, 2), (1, 1, 1, 1), k=k, epilogue=Epilogue(("bias", *steps)))
        add(name, "conv", shape, 1, w=(3, 3, c, k), b=(k,))

    down("stem1", image_size, 3, dims[0] // 2, "gelu")
    down("stem2", image_size // 2, dims[0] // 2, dims[0])
    size = image_size // 4
    for stage, (c, depth, rate) in enumerate(zip(dims, depths, RATES, strict=True), 1):
        if stage > 1:
            down(f"down{stage}", size, dims[stage - 2], c)
            size //= 2
        e, heads = 4 * c, c // HEAD_WIDTH
        shape = dwsconv.DWSConvShape(1, size, size, c)
        add(f"dwsconv{stage}", "dwsconv", shape, depth, dw_w=(3, 3, c), dw_b=(c,), pw_w=(c, c), pw_b=(c,))
        names = {"ln_g": (c,), "ln_b": (c,), "qkv_w": (c, 3 * c), "qkv_b": (3 * c,), "pr_w": (c, c), "pr_b": (c,)}
        if rate > 1:
            names |= {"sal_w": (3, 3, c), "sal_b": (1,), "up_w": (rate, rate, c), "up_b": (c,)}
        add(f"saa{stage}", "saa", SAAShape(n=1, h=size, w=size, c=c, heads=heads, r=rate), depth, **names)
        sizes = {"ex_w": (c, e), "ex_b": (e,), "dw_w": (3, 3, e), "dw_b": (e,), "dec_w": (e,), "dec_b": (1,)}
        shape_e = ciffn.CIFFNShape(1, size, size, c, e)
        add(f"ciffn{stage}", "ciffn", shape_e, depth, **sizes, g=(e,), pr_w=(e, c), pr_b=(c,))
    add("head", "head", head.HeadShape(1, size, size, dims[-1], 1000), 1, w=(dims[-1], 1000), b=(1000,))
    return found


class Bench:
    """Builds, checks and times kernels for one target."""

    def __init__(self, target: dict[str, Any], isa: Any, threads: int, seconds: float, tiling: dict[str, int]) -> None:
        self.target, self.isa, self.threads, self.seconds, self.tiling = target, isa, threads, seconds, tiling
        self.peak_flops, self.peak = self._peak()

    def build(self, func: Any) -> Any:
        import tvm

        # LLVM does this too, and TVM's takes minutes over a register tile.
        with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
            name = str(func.attrs["global_symbol"])
            return tvm.compile(tvm.IRModule({name: func}), target=tvm.target.Target(self.target)).jit()[name]

    def row(self, case: Case) -> dict[str, Any]:
        """What is known of a kernel once it is built, checked and timed."""
        import dataclasses

        import tvm

        from schedules.cpu.generator import lowered
        from schedules.cpu.registry import GENERATORS

        family = next(each for each in GENERATORS if case.family == each.OP)
        tiling = family.default_for(case.shape, self.isa, self.threads)
        known = {key: value for key, value in self.tiling.items() if hasattr(tiling, key)}
        began = time.perf_counter()
        chosen = dataclasses.replace(tiling, **known)
        func, packed = lowered(family.loops(case.shape, self.isa, chosen, self.threads), case.weights)
        kernel = self.build(func)
        built = time.perf_counter() - began
        shape = case.shape
        x = np.random.RandomState(1).randn(shape.n, shape.h, shape.w, shape.c).astype(np.float32)
        expected = family.reference_for(shape, {"x": x, **case.weights})
        out = tvm.runtime.tensor(np.zeros(expected.shape, np.float32))
        arguments = [*map(tvm.runtime.tensor, (x, *packed)), out]
        kernel(*arguments)
        error = np.abs(out.numpy() - expected).max() / max(1.0, np.abs(expected).max())
        seconds, peak_seconds = self._alternate(lambda: kernel(*arguments), self.peak)
        peak = self.threads * self.peak_flops / peak_seconds
        rate = shape.flops / seconds
        row = {"kernel": case.name, "calls": case.calls, "ms": 1e3 * seconds, "build_seconds": built}
        row |= {"gflops": rate / 1e9, "peak_gflops": peak / 1e9, "share": rate / peak}
        return row | {"error": float(error)}

    def _alternate(self, *runs: Callable[[], None]) -> list[float]:
        """The least time of each, taken in turn, at least once."""
        clock = time.thread_time if self.threads == 1 else time.perf_counter
        best = [float("inf")] * len(runs)
        end = time.perf_counter() + self.seconds
        while best[0] == float("inf") or time.perf_counter() < end:
            for index, run in enumerate(runs):
                began = clock()
                run()
                best[index] = min(best[index], clock() - began)
        return best

    def _peak(self) -> tuple[int, Callable[[], None]]:
        """The work of the loop of multiply-adds, and a call of it on one thread."""
        import tvm

        func, flops = multiply_adds(self.isa)
        kernel = self.build(func)
        zero = tvm.runtime.tensor(np.zeros(self.isa.lanes, np.float32))
        result = tvm.runtime.tensor(np.zeros(CHAINS * self.isa.lanes, np.float32))
        return flops, lambda: kernel(zero, result)


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


if __name__ == "__main__":
    main()
