"""GFLOP/s of every generated kernel of some models, beside the multiply-add peak measured at the same moment.

    python benchmarks/kernels.py [--models timm:resnet18,timm:levit_128s] [--only REGEX] [--threads 1] [--seconds 0.3]

Kernels that models share are measured once. At the end stands what each class of kernels reaches over all models: where
it computes little, what it moves at least in a second says more.

A convolution by Winograd may pass the peak: what counts are the multiply-adds that the model asks for.

Clock speeds move, so each kernel alternates with a loop of multiply-adds that touches registers only; the share of
the peak is what to compare between runs. Times are CPU time of the calling thread when there is one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from command_line import parsed, stand_in
from peak import Peak, built
from rows import Row, lined

from schedules.spec import KernelSpec

SHORT = "--models saevit_micro,timm:test_vit --image-size 32 --seconds 0.01"


@dataclass(frozen=True)
class Case:
    """One kernel: the model it is of, its name, what it computes, how often the network calls it."""

    model: str
    name: str
    spec: KernelSpec
    calls: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=lambda text: text.split(","), default=["saevit_xs"], help="as --model is given"
    )
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--only", default="", help="a regular expression over kernel names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="how long to measure each kernel")
    parser.add_argument("--target", default="", help="a TVM target as JSON instead of this machine's")
    parser.add_argument("--tiling", default="{}", help='knobs that replace the default ones, as JSON: {"chunk": 14}')
    options = parsed(parser, SHORT, kept=False)
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    sys.path += stand_in()
    from saevit_tvm.targets import native
    from schedules.machines.cpus import isa_of

    target = json.loads(options.target) if options.target else native().tvm
    bench = Bench(target, isa_of(target), options.threads, options.seconds, json.loads(options.tiling))
    print(f"{'model':24} {'kernel':16} {'calls':>5} {'ms':>8} {'GFLOP/s':>8} {'peak':>7} {'share':>6} {'error':>8}")
    rows: list[Row] = []
    for model in options.models:
        for case in cases(model, options.image_size, options.threads):
            if re.search(options.only, case.name):
                rows.append(bench.row(case))
                print(_line(rows[-1]), flush=True)
                (options.out / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = classes(rows)
    (options.out / "kernels.md").write_text(table)
    print(f"\n{table}", end="")


def _line(row: Row) -> str:
    return (
        f"{row['model'][-24:]:24} {row['kernel']:16} {row['calls']:5} {row['ms']:8.3f} {row['gflops']:8.1f} "
        f"{row['peak_gflops']:7.1f} {100 * row['share']:5.1f}% {row['error']:8.1e}"
    )


def classes(rows: Sequence[Row]) -> str:
    """A table of what the kernels of each operation reach, those that take the most time first, and of all of them."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row["op"], []).append(row)
    total = sum(map(_ms, rows))
    ordered = sorted(by_op.items(), key=lambda item: -sum(map(_ms, item[1])))
    columns = ["kernels", "models", "how many", "share of the time", "share of the peak", "GB/s"]
    return lined(columns, [_class(op, each, total) for op, each in [*ordered, ("all", list(rows))]])


def _class(op: str, rows: Sequence[Row], total: float) -> list[str]:
    ms = sum(map(_ms, rows))
    reached = sum(_ms(row) * row["share"] for row in rows) / ms
    moved = sum(row["calls"] * row["bytes"] for row in rows) / ms * 1e-6
    models = len({row["model"] for row in rows})
    shares = [f"{100 * ms / total:.1f} %", f"{100 * reached:.0f} %"]
    return [op, str(models), str(len(rows)), *shares, f"{moved:.1f}"]


def _ms(row: Row) -> float:
    """Of all calls in one inference."""
    return row["calls"] * row["ms"]


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
        cases.append(Case(model, f"{spec.op}{seen[spec.op] if totals[spec.op] > 1 else ''}", spec, calls))
    return cases


class Bench:
    """Builds, checks and times kernels for one target."""

    def __init__(self, target: dict[str, Any], isa: Any, threads: int, seconds: float, tiling: dict[str, int]) -> None:
        self.target, self.isa, self.threads, self.seconds, self.tiling = target, isa, threads, seconds, tiling
        self.peak = Peak(target)
        self._known: dict[str, Row] = {}

    def row(self, case: Case) -> Row:
        """What is known of a kernel once it is built, checked and timed, here or for a model before."""
        if case.spec.text not in self._known:
            self._known[case.spec.text] = self._measured(case.spec)
        named = {"model": case.model, "kernel": case.name, "op": case.spec.op, "calls": case.calls}
        return named | self._known[case.spec.text]

    def _measured(self, spec: KernelSpec) -> Row:
        import dataclasses

        import tvm

        from schedules.cpu.registry import generator

        made_by = generator(spec, self.isa)
        assert made_by is not None
        tiling = made_by.default(spec, self.isa, self.threads)
        known = {key: value for key, value in self.tiling.items() if hasattr(tiling, key)}
        random = np.random.RandomState(1)
        weights = {each.name: random.randn(*each.shape) / max(each.shape[0], 1) ** 0.5 for each in spec.weights}
        weights = {name: np.abs(value).astype(np.float32) for name, value in weights.items()}
        inputs = {each.name: random.randn(*each.shape).astype(np.float32) for each in spec.inputs}
        func, packed = made_by.lower(spec, weights, self.isa, dataclasses.replace(tiling, **known), self.threads)
        kernel = built(func, self.target)
        expected = made_by.reference(spec, {**inputs, **weights})
        out = tvm.runtime.tensor(np.zeros(expected.shape, np.float32))
        arguments = [*map(tvm.runtime.tensor, (*inputs.values(), *packed)), out]
        kernel(*arguments)
        error = np.abs(out.numpy() - expected).max() / max(1.0, np.abs(expected).max())
        seconds, peak_seconds = self._alternate(lambda: kernel(*arguments), self.peak)
        peak = self.threads * self.peak.flops / peak_seconds
        rate = made_by.flops(spec) / seconds
        row = {"ms": 1e3 * seconds, "bytes": made_by.bytes(spec)}
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
