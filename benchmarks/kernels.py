"""GFLOP/s of every generated kernel of a model, beside the multiply-add peak measured at the same moment.

    python benchmarks/kernels.py [--model timm:resnet18] [--only REGEX] [--threads 1] [--seconds 0.3]

Clock speeds move, so each kernel alternates with a loop of multiply-adds that touches registers only; the share of
the peak is what to compare between runs. Times are CPU time of the calling thread when there is one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from command_line import parsed
from peak import Peak, built

from schedules.spec import KernelSpec

SHORT = "--model saevit_micro --image-size 32 --seconds 0.01"


@dataclass(frozen=True)
class Case:
    """One kernel: its name, what it computes, how often the network calls it."""

    name: str
    spec: KernelSpec
    calls: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="saevit_xs", help="as saevit-tvm takes it")
    parser.add_argument("--image-size", type=int)
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
    for case in cases(options.model, options.image_size, options.threads):
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


def cases(model: str, image_size: int | None = None, threads: int = 1) -> list[Case]:
    """Every declared kernel of a network, in the order in which it calls them first."""
    from tvm import relax

    from saevit_tvm import backends, targets
    from saevit_tvm.compiler.street import Dump, Found, Recipe, walked
    from saevit_tvm.models.opening import open_model
    from schedules.kernels import declared

    target = targets.native().cut_for(threads)
    recipe = Recipe(open_model(model, image_size=image_size), target)
    mod = walked(backends.get(target.kind), recipe, Found(), Dump(), last="kernels")
    values = relax.analysis.get_var2val(mod["main"]).values()
    called = [value.args[0] for value in values if isinstance(value, relax.Call) and value.op.name == "relax.call_tir"]
    specs = {name: declared(mod[name]) for name in dict.fromkeys(called)}
    found = [(spec, called.count(name)) for name, spec in specs.items() if spec is not None]
    totals, seen = Counter(spec.op for spec, _ in found), Counter[str]()
    cases = []
    for spec, calls in found:
        seen[spec.op] += 1
        cases.append(Case(f"{spec.op}{seen[spec.op] if totals[spec.op] > 1 else ''}", spec, calls))
    return cases


class Bench:
    """Builds, checks and times kernels for one target."""

    def __init__(self, target: dict[str, Any], isa: Any, threads: int, seconds: float, tiling: dict[str, int]) -> None:
        self.target, self.isa, self.threads, self.seconds, self.tiling = target, isa, threads, seconds, tiling
        self.peak = Peak(target)

    def row(self, case: Case) -> dict[str, Any]:
        """What is known of a kernel once it is built, checked and timed."""
        import dataclasses

        import tvm

        from schedules.cpu.registry import generator

        made_by, spec = generator(case.spec, self.isa), case.spec
        assert made_by is not None
        tiling = made_by.default(spec, self.isa, self.threads)
        known = {key: value for key, value in self.tiling.items() if hasattr(tiling, key)}
        random = np.random.RandomState(1)
        weights = {each.name: random.randn(*each.shape) / max(each.shape[0], 1) ** 0.5 for each in spec.weights}
        weights = {name: np.abs(value).astype(np.float32) for name, value in weights.items()}
        inputs = {each.name: random.randn(*each.shape).astype(np.float32) for each in spec.inputs}
        before = time.perf_counter()
        func, packed = made_by.lower(spec, weights, self.isa, dataclasses.replace(tiling, **known), self.threads)
        kernel = built(func, self.target)
        build_seconds = time.perf_counter() - before
        expected = made_by.reference(spec, {**inputs, **weights})
        out = tvm.runtime.tensor(np.zeros(expected.shape, np.float32))
        arguments = [*map(tvm.runtime.tensor, (*inputs.values(), *packed)), out]
        kernel(*arguments)
        error = np.abs(out.numpy() - expected).max() / max(1.0, np.abs(expected).max())
        seconds, peak_seconds = self._alternate(lambda: kernel(*arguments), self.peak)
        peak = self.threads * self.peak.flops / peak_seconds
        rate = made_by.flops(spec) / seconds
        row = {"kernel": case.name, "calls": case.calls, "ms": 1e3 * seconds, "build_seconds": build_seconds}
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


if __name__ == "__main__":
    main()
