#!/usr/bin/env python3
"""The search of saevit-tvm beside TVM's own, with the same minutes: what each has found by when.

    python benchmarks/tuning.py --model saevit_xs --minutes 20 --out benchmarks/results

Both start from nothing: no shipped records. TVM's own is what `relax.get_pipeline("static_shape_tuning")` does:
`zero`, then `relax_integration.tune_relax` with its default builder, runner, cost model and scheduler. Its builder may
take --build-seconds for a candidate, because its default of 30 does not even suffice for the imports of its workers
on a slow machine. A curve shows the latency predicted from the best records so far (calls of each kernel times its best
time); dots show the model built from these records and timed, both in turns. Run it on an idle machine.

Each step is written as soon as it is done. A run that is stopped tells what it has, and --resume does the other steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from command_line import parsed

SHORT = "--model saevit_micro --image-size 32 --minutes 0.1 --seconds 0.05 --fractions 1 --builds 2"
POLL_SECONDS = 0.25
CLOSE = 1.05
STOCK_TRIALS = 1_000_000  # TVM's search knows no minutes: it is stopped from outside
FAILED_SECONDS = 1e9  # TVM notes a failure as a time of 1e10
RECORDS, WORKLOADS = "database_tuning_record.json", "database_workload.json"
NODE_RATES = "built and timed a second, by Ray nodes that share this machine"
NAMES = {"ours": "saevit-tvm", "stock": "TVM's own"}
COLOURS = {"ours": "tab:red", "stock": "tab:gray"}


class Point(NamedTuple):
    """What was known when; `predicted_ms` is None while a kernel has no time at all."""

    seconds: float
    trials: int
    predicted_ms: float | None


def main() -> None:
    options = _options()
    if options.stock_child is not None:
        tune_stock(options.model, options.image_size, options.stock_child, options.build_seconds)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from saevit_tvm import targets
    from saevit_tvm.models.opening import open_model

    source, target = open_model(options.model, image_size=options.image_size), targets.native()
    asked = {"model": source.name, "input_shape": list(source.input_shape), "minutes": options.minutes}
    asked |= {"fractions": options.fractions, "build_seconds": options.build_seconds, "target": target.fingerprint}
    results = Results(options.out, asked, resume=options.resume)
    try:
        compare(source, target, options, results)
    finally:  # and if it was stopped, what there is
        results.tell()


def compare(source: Any, target: Any, options: argparse.Namespace, results: Results) -> None:
    """All steps that are not done yet."""
    if "ours" not in results.known:  # a search that was stopped begins anew: its minutes have to be in one piece
        shutil.rmtree(results.work / "ours", ignore_errors=True)
    ours = Ours(source, target, results.work / "ours")
    if "ours" not in results.known:
        results.keep(ours=described(ours.search(options.minutes)) | ours.told)
    if "build_throughput" not in results.known:
        candidates = ours.candidates(options.builds)
        results.keep(build_throughput=build_throughput(candidates, target))
        if options.nodes:
            results.keep(node_throughput=node_throughput(candidates, target, options.nodes))
    searches: dict[str, Ours | Stock] = {"ours": ours}
    if not options.only_ours:
        searches["stock"] = stock = Stock(source, target, results.work / "stock", options)
        if "stock" not in results.known:
            results.keep(stock=described(stock.search(options.minutes)) | stock.told)
    if any("measured" not in results.known[name] for name in searches):
        say("compiling what was found")
        built = {name: search.built(results.known[name], results.known) for name, search in searches.items()}
        for name, found in measured(built, source, target, options.seconds).items():
            results.keep(**{name: results.known[name] | {"measured": found}})


class Results:
    """What is known so far, in the folder of the results; each step is written as soon as it is done."""

    def __init__(self, folder: Path, asked: dict[str, Any], *, resume: bool) -> None:
        self._folder = folder
        self.work = folder / "tuning.work"
        self.known = self._earlier(asked) if resume else asked
        if not resume:
            shutil.rmtree(self.work, ignore_errors=True)

    def _earlier(self, asked: dict[str, Any]) -> dict[str, Any]:
        path = self._folder / "tuning.json"
        known = json.loads(path.read_text()) if path.exists() else asked
        if any(known.get(name) != value for name, value in asked.items()):
            raise SystemExit(f"{path} is of another comparison: give the same options, or leave out --resume")
        return known

    def keep(self, **found: Any) -> None:
        self.known.update(found)
        self._write("tuning.json", json.dumps(self.known, indent=1) + "\n")

    def tell(self) -> None:
        """The table and the plot of what there is."""
        if "ours" in self.known:
            self._write("tuning.md", table(self.known))
            plot(self.known, self._folder / "tuning.png")
            print(table(self.known))

    def _write(self, name: str, text: str) -> None:
        staged = self._folder / f".{name}.new"
        staged.write_text(text)
        staged.replace(self._folder / name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="saevit_xs")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--minutes", type=float, default=20.0, help="of each search")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each dot")
    parser.add_argument("--build-seconds", type=float, default=120.0, help="what TVM's builder may take a candidate")
    parser.add_argument(
        "--fractions",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[0.1, 0.25, 0.5, 1.0],
        help="of the minutes, at which the model is built and timed",
    )
    parser.add_argument("--builds", type=int, default=32, help="candidates that the throughput is measured with")
    parser.add_argument(
        "--nodes",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[],
        help="also trials a second on Ray clusters of so many nodes here, such as 1,2,4",
    )
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep the steps that --out has already")
    parser.add_argument("--stock-child", type=Path, help=argparse.SUPPRESS)
    return parsed(parser, SHORT)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Our search -----------------------------------------------------------


class Ours:
    """A session on an empty store; what was known when is in the store's own records."""

    def __init__(self, source: Any, target: Any, folder: Path) -> None:
        from saevit_tvm.backends import kernels_to_tune
        from saevit_tvm.tuning.session import Session
        from saevit_tvm.tuning.space import Features, space_for
        from saevit_tvm.tuning.store import Store

        self.source, self.target, self.folder = source, target, folder
        self.store = Store(folder / "all", target)
        self.curve: list[Point] = []
        self.told: dict[str, Any] = {}
        self.session = Session(
            kernels_to_tune(source, target),
            target,
            self.store,
            model=source.name,
            space_for=lambda kernel: space_for(kernel, target),
            features=Features(),
            show=self._note,
        )

    def _note(self, snapshot: Any) -> None:
        point = Point(time.monotonic() - self._start, snapshot.trials, snapshot.best_ms)
        if not self.curve or point[1:] != self.curve[-1][1:]:
            self.curve.append(point)

    def search(self, minutes: float) -> list[Point]:
        say(f"our search: {minutes:g} minutes")
        self._start, began = time.monotonic(), datetime.now(timezone.utc).isoformat()
        found = self.session.run(minutes=minutes)
        self.told = {"kernels": found.tasks, "valid": found.valid, "guided": found.guided, "ended": found.ended}
        self.told["began"] = began
        return self.curve

    def built(self, found: dict[str, Any], asked: dict[str, Any]) -> dict[float, Any]:
        """The model with the records that there were at each fraction of the time."""
        from stages import compiled

        from relay_patterns import find_blocks, find_primitives
        from saevit_tvm.tuning.records import Records, Source

        made, began = {}, datetime.fromisoformat(found["began"])
        for fraction in asked["fractions"]:
            store = self._at(began + timedelta(minutes=fraction * asked["minutes"]))
            records = Records([Source(store, shipped=False, near=False)], self.target)
            finders = [find_blocks, find_primitives]
            made[fraction] = compiled(self.source, self.target, finders=finders, database=records.database)
        return made

    def _at(self, moment: datetime) -> Any:
        """The best of the store as it was then."""
        from saevit_tvm.tuning.store import Store

        store = Store(self.folder / f"{moment.timestamp()}", self.target)
        for key, workload in self.store.workloads.items():
            by_then = [trial for trial in self.store.fastest(key) if datetime.fromisoformat(trial.time) <= moment]
            for trial in by_then[:1]:
                store.add(trial, workload)
        return store

    def candidates(self, count: int) -> list[Any]:
        """Candidates of all kernels alike."""
        share = -(-count // len(self.session.tasks))
        proposed = [task.propose(share, self.session.guide.model) for task in self.session.tasks]
        return [candidate for some in proposed for candidate in some][:count]


# TVM's own ------------------------------------------------------------


class Stock:
    """TVM's search in a process of its own, which is watched, and killed when its time is up."""

    def __init__(self, source: Any, target: Any, folder: Path, options: argparse.Namespace) -> None:
        self.source, self.target, self.folder, self.options = source, target, folder, options
        self.told: dict[str, Any] = {}
        self._marks: list[tuple[float, int]] = []

    @property
    def _records(self) -> Path:
        return self.folder / RECORDS

    def search(self, minutes: float) -> list[Point]:
        say(f"TVM's search: {minutes:g} minutes")
        size = [] if self.options.image_size is None else ["--image-size", str(self.options.image_size)]
        command = [sys.executable, __file__, "--stock-child", str(self.folder), "--model", self.options.model, *size]
        command += ["--build-seconds", str(self.options.build_seconds)]
        shutil.rmtree(self.folder, ignore_errors=True)  # what a search that was stopped has left
        self.folder.mkdir(parents=True)
        start = time.monotonic()
        with (self.folder / "log").open("wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                while child.poll() is None and time.monotonic() - start < 60 * minutes:
                    time.sleep(POLL_SECONDS)
                    self._mark(time.monotonic() - start)
                ended = "the time is up" if child.poll() is None else f"it ended with status {child.returncode}"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        curve, kernels, valid = stock_curve(self._marks, self._lines(), self._weights())
        self.told = {"kernels": kernels, "valid": valid, "ended": ended}
        return curve

    def _mark(self, seconds: float) -> None:
        lines = self._records.read_bytes().count(b"\n") if self._records.exists() else 0
        if not self._marks or lines != self._marks[-1][1]:
            self._marks.append((seconds, lines))

    def _lines(self) -> list[str]:
        """The whole lines of its database; a kill may have torn the last one."""
        text = self._records.read_text() if self._records.exists() else ""
        return text.split("\n")[:-1]

    def _weights(self) -> dict[int, int]:
        """How often an inference calls each workload, by its number in the database; below zero if it is not there."""
        from tvm.s_tir.meta_schedule.database import Workload
        from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

        from saevit_tvm.tuning.replay import module_key

        file = self.folder / WORKLOADS
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        places = {module_key(Workload.from_json(json.loads(line)).mod): place for place, line in enumerate(lines)}
        tasks = extract_tasks(stock_module(self.source, self.target), _tvm_target(self.target))
        return {
            places.get(module_key(task.dispatched[0]), -1 - number): int(task.weight)
            for number, task in enumerate(tasks)
        }

    def built(self, found: dict[str, Any], asked: dict[str, Any]) -> dict[float, Any]:
        made: dict[int, Any] = {}  # by records: at first there may be none for long
        counts = {fraction: trials_by(found, 60 * fraction * asked["minutes"]) for fraction in asked["fractions"]}
        for count in set(counts.values()):
            made[count] = stock_compiled(self.source, self.target, self._prefix(count))
        return {fraction: made[count] for fraction, count in counts.items()}

    def _prefix(self, lines: int) -> Path:
        """The database as it was with so many records."""
        folder = self.folder / f"{lines}"
        folder.mkdir(exist_ok=True)
        workloads = self.folder / WORKLOADS
        (folder / WORKLOADS).write_text(workloads.read_text() if workloads.exists() else "")
        (folder / RECORDS).write_text("".join(f"{line}\n" for line in self._lines()[:lines]))
        return folder


def tune_stock(model: str, image_size: int | None, folder: Path, build_seconds: float) -> None:
    """TVM's search, without end: whoever started this process ends it."""
    from tvm.s_tir.meta_schedule.builder import LocalBuilder
    from tvm.s_tir.meta_schedule.relax_integration import tune_relax

    from saevit_tvm import targets
    from saevit_tvm.models.opening import open_model

    target = targets.native()
    tune_relax(
        mod=stock_module(open_model(model, image_size=image_size), target),
        params={},
        target=_tvm_target(target),
        work_dir=str(folder),
        max_trials_global=STOCK_TRIALS,
        builder=LocalBuilder(timeout_sec=build_seconds),
    )


def stock_module(source: Any, target: Any) -> Any:
    """The model as TVM's pipeline for tuning sees it, with the weights' layout left open, which it advises for CPUs."""
    import tvm
    from tvm.relax import get_pipeline, transform

    from saevit_tvm.compiler.importers import import_model

    passes = [
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        get_pipeline("zero"),
        transform.AttachAttrLayoutFreeBuffers(),
    ]
    with _tvm_target(target):
        return tvm.transform.Sequential(passes)(import_model(source))


def stock_compiled(source: Any, target: Any, folder: Path) -> Any:
    """The executable that TVM makes with a database."""
    import tvm
    from tvm.relax import transform

    with _tvm_target(target):
        passes = [
            transform.MetaScheduleApplyDatabase(str(folder)),
            transform.SplitLayoutRewritePreproc(),
            transform.FoldConstant(),
            transform.DeadCodeElimination(),
        ]
        mod = tvm.transform.Sequential(passes)(stock_module(source, target))
    return tvm.compile(mod, _tvm_target(target))


def stock_curve(
    marks: Sequence[tuple[float, int]], lines: Sequence[str], weights: dict[int, int]
) -> tuple[list[Point], int, int]:
    """What TVM had found by when, of how many kernels, with how many valid measurements."""
    best = dict.fromkeys(weights, math.inf)
    curve, valid, read = [], 0, 0
    for seconds, count in marks:
        for line in lines[read:count]:
            workload, (_, run_secs, *_) = json.loads(line)
            mean = statistics.fmean(run_secs) if run_secs else math.inf
            if mean < FAILED_SECONDS:
                valid += 1
                best[workload] = min(best.get(workload, math.inf), mean)
        read = max(read, count)
        total = sum(weight * best[number] for number, weight in weights.items())
        curve.append(Point(seconds, count, 1e3 * total if total < math.inf else None))
    return curve, len(weights), valid


def _tvm_target(target: Any) -> Any:
    import tvm

    return tvm.target.Target(target.tvm)


# Figures --------------------------------------------------------------


def trials_by(found: dict[str, Any], moment: float) -> int:
    """The trials that a search had made after so many seconds."""
    return max((trials for seconds, trials, _ in found["curve"] if seconds <= moment), default=0)


def described(curve: Sequence[Point]) -> dict[str, Any]:
    """A curve, and what can be read off it."""
    known = [(point.seconds, point.predicted_ms) for point in curve if point.predicted_ms is not None]
    best = known[-1][1] if known else None
    close = next((seconds for seconds, ms in known if best is not None and ms <= CLOSE * best), None)
    last = curve[-1] if curve else Point(0.0, 0, None)
    return {
        "curve": [list(point) for point in curve],
        "trials": last.trials,
        "trials_a_second": last.trials / last.seconds if last.seconds else 0.0,
        "predicted_ms": best,
        "seconds_to_first_prediction": known[0][0] if known else None,
        "seconds_to_within_5_percent": close,
    }


def measured(built: dict[str, dict[float, Any]], source: Any, target: Any, seconds: float) -> dict[str, list[Any]]:
    """The milliseconds of every executable, all in turns, on as many threads as the target has cores."""
    from stages import in_turns

    example = np.random.RandomState(0).standard_normal(source.input_shape).astype("float32")
    expected = source.reference(example)[0]
    flat = {(name, fraction): made for name, some in built.items() for fraction, made in some.items()}
    say("measuring what was built")
    told: dict[str, list[Any]] = {name: [] for name in built}
    timed = in_turns(flat, example, int(target.tvm.get("num-cores", 1)), seconds)
    for (name, fraction), (times, answer) in timed.items():
        error = float(np.abs(answer - expected).max())
        told[name].append({"fraction": fraction, "median_ms": statistics.median(times), "max_abs_error": error})
    return told


def build_throughput(candidates: Sequence[Any], target: Any) -> dict[int, float]:
    """Candidates built a second, by the number of workers; each worker's first is its warming up."""
    from saevit_tvm.measure.candidates import Builders

    found = {}
    cores = len(os.sched_getaffinity(0))
    for workers in sorted({2**power for power in range(cores.bit_length()) if 2**power < cores} | {cores}):
        say(f"building {len(candidates)} candidates with {workers} workers")
        with tempfile.TemporaryDirectory() as folder:
            builders = Builders(target, Path(folder), workers)
            try:
                for some in (candidates[:workers], candidates):
                    start = time.perf_counter()
                    made = sum(1 for _ in builders.build(some, lambda: False))
                    found[workers] = made / (time.perf_counter() - start)
            finally:
                builders.pool.kill()
    return found


def node_throughput(candidates: Sequence[Any], target: Any, nodes: Sequence[int]) -> dict[int, float]:
    """Candidates built and timed a second, by the number of Ray nodes, which share this machine's cores."""
    from saevit_tvm.tuning.measurers import open_measurer

    found = {}
    for count in nodes:
        say(f"measuring {len(candidates)} candidates on {count} nodes")
        with open_measurer("local", target, cluster=f"local:{count}", say=say) as measurer:
            for some in (candidates[:count], candidates):
                start = time.perf_counter()
                made = sum(1 for _ in measurer.measure(some, math.inf, lambda: False))
                found[count] = made / (time.perf_counter() - start)
    return found


def table(result: dict[str, Any]) -> str:
    shape = "x".join(map(str, result["input_shape"]))
    lines = [
        f"{result['model']}, input {shape}, float32, {result['minutes']:g} minutes for each search, both from nothing.",
        "",
        "| search | kernels | trials | valid | guided by a model | trials a second | first prediction s |"
        " within 5 % of its best s | predicted ms | measured ms | ended |",
        "|---" * 11 + "|",
    ]
    for name in ("ours", "stock"):
        if name in result:
            one = result[name]
            cells = [NAMES[name], one["kernels"], one["trials"], one["valid"], one.get("guided", "unknown")]
            cells.append(f"{one['trials_a_second']:.2f}")
            cells += [_figure(one["seconds_to_first_prediction"], 0), _figure(one["seconds_to_within_5_percent"], 0)]
            cells += [_figure(one["predicted_ms"], 2), _last_measured(one), one["ended"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    timed = [name for name in NAMES if "measured" in result.get(name, {})]
    if timed:
        lines += ["", f"| share of the time | {' | '.join(NAMES[name] for name in timed)} |"]
        lines.append("|---" * (1 + len(timed)) + "|")
    for number, fraction in enumerate(result["fractions"] if timed else []):
        cells = [f"{result[name]['measured'][number]['median_ms']:.2f} ms" for name in timed]
        lines.append(f"| {fraction:.0%} | {' | '.join(cells)} |")
    for key, what in (("build_throughput", "built a second, by workers"), ("node_throughput", NODE_RATES)):
        if key in result:
            rates = ", ".join(f"{rate:.1f} with {count}" for count, rate in result[key].items())
            lines += ["", f"Candidates {what}: {rates}."]
    return "\n".join(lines) + "\n"


def _last_measured(one: dict[str, Any]) -> str:
    return f"{one['measured'][-1]['median_ms']:.2f}" if "measured" in one else "not yet"


def _figure(value: float | None, digits: int) -> str:
    return "never" if value is None else f"{value:.{digits}f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Latency against minutes and against trials, and builds a second against workers."""
    try:
        import matplotlib
    except ImportError:
        say("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_time, by_trials, builds) = pyplot.subplots(1, 3, figsize=(12, 3.6), width_ratios=(3, 3, 1.5))
    for name, colour in COLOURS.items():
        if name in result:
            _draw(result, name, colour, by_time, by_trials)
    for axis, label in ((by_time, "minutes"), (by_trials, "trials")):
        axis.set_xlabel(label)
        axis.set_ylabel("ms an inference")
        axis.set_yscale("log")
    by_time.legend(fontsize=7)
    rates = result.get("build_throughput", {})
    builds.bar([str(workers) for workers in rates], list(rates.values()), color="tab:red")
    builds.set_xlabel("build workers")
    builds.set_ylabel("candidates a second")
    figure.suptitle(f"{result['model']}: what each search had found by when", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(result: dict[str, Any], name: str, colour: str, by_time: Any, by_trials: Any) -> None:
    one = result[name]
    known = [(seconds / 60, trials, ms) for seconds, trials, ms in one["curve"] if ms is not None]
    dots = []
    for found in one.get("measured", []):
        moment = found["fraction"] * result["minutes"]
        dots.append((moment, trials_by(one, 60 * moment), found["median_ms"]))
    for axis, column in ((by_time, 0), (by_trials, 1)):
        if known:
            xs, ys = [point[column] for point in known], [point[2] for point in known]
            axis.step(xs, ys, where="post", color=colour, label=f"{NAMES[name]}: predicted")
        xs, ys = [dot[column] for dot in dots], [dot[2] for dot in dots]
        axis.plot(xs, ys, "o", color=colour, label=f"{NAMES[name]}: measured")


if __name__ == "__main__":
    main()
