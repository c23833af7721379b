"""The half of gpu_slot.py that runs beside the GPU: which step is next, what it gave, and when to stop.

Everything has one deadline. A step's result is on the disk before the next begins, in a folder for this very card and
for what was packed; the same command goes on after the last one. Workers are processes, which may crash or hang.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_slot_contenders import CONTENDERS, IN_TURN, LIMITS, MAX, OURS, Refused, artifact, serve

Row = dict[str, Any]

MANIFEST, RESULTS, TABLE, MACHINE = "manifest.json", "results.jsonl", "results.md", "machine.json"
TURNS = 3
FIRST = 4  # groups that come before the candidates
MOST_TUNED = 2  # groups for which PyTorch may search for minutes, meanwhile
CHECK_SECONDS, STEP_SECONDS, START_SECONDS = 30.0, 240.0, 120.0
CANDIDATES = 0.5  # of the time that is left when their turn comes


class TimeIsUp(Exception):
    """The deadline has passed."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parent
    manifest = read_manifest(folder)
    if options.worker is not None:
        return serve(folder, manifest, options.runtime, options.worker, options.rehearsal)
    if importlib.util.find_spec("torch") is None:
        raise Refused("PyTorch is not installed here: use a Python that has it")
    slot = Slot(folder, manifest, options)
    try:
        slot.run()
    except TimeIsUp:
        say("the time is up")
    finally:
        slot.end()
        print(slot.table())
    return 0


def read_manifest(folder: Path) -> Row:
    try:
        return dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError) as error:
        raise Refused(
            f"'{folder / MANIFEST}' cannot be read: unpack what `prepare` made, and use the program in it"
        ) from error


def digest(manifest: Row) -> str:
    """What tells results of this archive from those of another."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:8]


def groups(manifest: Row) -> list[Row]:
    """Model, batch and arithmetic of what is compared, the most important first."""
    found = [{key: each[key] for key in ("model", "batch", "dtype")} for each in manifest["artifacts"]]
    return [each for at, each in enumerate(found) if each not in found[:at]]


def rows_of(path: Path) -> list[Row]:
    """The results so far; a line that was cut off by a kill, or is damaged, is left out and measured again."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("order"), dict)]


class Slot:
    """The steps in their order, on one card."""

    def __init__(self, folder: Path, manifest: Row, options: argparse.Namespace) -> None:
        self._folder, self._manifest, self._options = folder, manifest, options
        self._end = time.monotonic() + (options.seconds or float("inf"))
        self._worker: Worker | None = None
        self._apart: Worker | None = None  # in which PyTorch searches
        self._searched = [{**each, "contender": MAX} for each in groups(manifest)[:MOST_TUNED]]
        if options.contenders and MAX not in options.contenders:
            self._searched = []
        self._out = options.results or folder
        self._rows: list[Row] = []

    def run(self) -> None:
        self._begin()
        self._check()
        self._search()
        wanted = groups(self._manifest)
        for group in wanted[:FIRST]:
            self._compare(group)
        for name in LIMITS:
            self._once({"do": "limit", "name": name})
        self._candidates()
        for group in wanted[FIRST:]:
            self._compare(group)
        while self._searched:
            self._look_at_search(self._left())
        say("everything is measured")

    def end(self) -> None:
        for worker in (self._worker, self._apart):
            if worker is not None:
                worker.end()

    def table(self) -> str:
        text = table(self._manifest, self._rows, self._out)
        if self._rows:
            (self._out / TABLE).write_text(text)
        return text

    # Time, and what is known

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeIsUp
        return left

    def _begin(self) -> None:
        """The folder of this card and this archive, and what it holds already."""
        self._worker = self._started()
        machine = {**self._worker.machine, **_driver()}
        self._out = self._out / f"{_slug(machine['card'])}-{digest(self._manifest)}"
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / MACHINE).write_text(json.dumps(machine, indent=1) + "\n")
        self._rows = rows_of(self._out / RESULTS)
        say(", ".join(f"{name} {value}" for name, value in machine.items()))

    def _started(self) -> Worker:
        return Worker(self._folder, self._options, self._out, min(START_SECONDS, self._left()))

    def _known(self, order: Row) -> Row | None:
        return next((row for row in self._rows if row["order"] == order), None)

    def _keep(self, order: Row, told: Row) -> Row:
        row = {"order": order, **{key: value for key, value in told.items() if key not in ("lost", "late")}}
        self._rows.append(row)
        with (self._out / RESULTS).open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        what = told.get("error") or next((told[key] for key in ("median_ms", "rate", "deviation") if key in told), "")
        say(f"{' '.join(map(str, order.values()))}: {what if isinstance(what, str) else f'{what:.4g}'}")
        return row

    # Steps

    def _once(self, order: Row) -> Row:
        """What a step gave, now or before."""
        if (known := self._known(order)) is not None:
            return known
        left = self._left()
        self._worker = self._worker or self._started()
        told = self._worker.ask(order, min(STEP_SECONDS, left))
        if "lost" in told:
            self._worker.end()
            self._worker = None
        if "late" in told:
            self._left()  # out of time is no result
        if self._apart is not None:
            told["beside"] = MAX
        return self._keep(order, told)

    def _check(self) -> None:
        """Whether ours runs, and is right, on the real thing: half a minute for as many as that serves."""
        end = time.monotonic() + CHECK_SECONDS
        for each in self._manifest["artifacts"]:
            if time.monotonic() < end:
                self._once({"do": "check", **{key: each[key] for key in ("contender", "model", "batch", "dtype")}})

    def _compare(self, group: Row) -> None:
        """Everyone in turns; who fails is out of this group, and who never worked is out of all."""
        told: dict[str, Row] = {}
        for turn in range(1, TURNS + 1):
            for contender in self._contenders(group):
                if "error" not in told.get(contender, {}):
                    told[contender] = self._once({"do": "turn", **group, "contender": contender, "turn": turn})
            self._look_at_search(0)

    def _contenders(self, group: Row) -> Iterator[str]:
        for contender in CONTENDERS:
            asked = not self._options.contenders or contender in self._options.contenders
            ours = contender in (OURS, IN_TURN)
            there = artifact(self._manifest, {**group, "contender": contender}) if ours else not self._is_out(contender)
            if asked and there and contender != MAX:
                yield contender

    def _is_out(self, contender: str) -> bool:
        """Whether a contender failed before it ever worked: it is the environment, and will fail again."""
        rows = [row for row in self._rows if row["order"].get("contender") == contender]
        return bool(rows) and all("error" in row and "deviation" not in row for row in rows)

    # PyTorch's search, which takes minutes, beside all else

    def _search(self) -> None:
        """Begin with the next group."""
        while self._searched and self._apart is None:
            order = {"do": "turn", **self._searched[0], "turn": 1}
            if self._is_out(MAX) or self._known(order):
                self._searched.pop(0)
                continue
            self._apart = self._started()
            self._apart.tell(order)

    def _look_at_search(self, seconds: float) -> None:
        """If it has found something: that in turns with ours."""
        told = self._apart.answer(seconds) if self._apart is not None else {"late": True}
        if self._apart is None or "late" in told:
            return
        order = {"do": "turn", **self._searched.pop(0)}
        apart, self._apart = self._apart, None
        try:
            row = self._keep({**order, "turn": 1}, told)
            for turn in range(2, TURNS + 1):
                if "error" not in row:
                    self._once({**order, "contender": OURS, "turn": TURNS + turn})
                    told = apart.ask({**order, "turn": turn}, self._left())
                    if "late" in told:
                        raise TimeIsUp
                    row = self._keep({**order, "turn": turn}, told)
        finally:
            apart.end()
        self._search()

    # Candidates of tuning

    def _candidates(self) -> None:
        for each in self._manifest["candidates"]:
            seconds = CANDIDATES * self._left()
            results = self._out / f"{each['folder']}.jsonl"
            command = [sys.executable, str(self._folder / "offline.py"), "--bundle", str(self._folder / each["folder"])]
            command += ["--results", str(results)]
            if seconds < float("inf"):
                command += ["--seconds", str(seconds)]
            for folder in [*self._options.runtime, self._folder / "runtime"]:
                command += ["--runtime", str(folder)]
            say(f"measuring {each['folder']}")
            with (self._out / "candidates.log").open("ab") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                limit = self._left()
                try:
                    process.wait(limit if limit < float("inf") else None)
                except subprocess.TimeoutExpired:
                    raise TimeIsUp from None
                finally:
                    _kill(process)
            if process.returncode:
                say(f"{each['folder']} ended with status {process.returncode}: see {log.name}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started: compilers of PyTorch's are processes of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _driver() -> Row:
    """What NVIDIA's own tool says of the card, where it is."""
    names = ("driver_version", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "power.limit", "temperature.gpu")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    line = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (part.strip() for part in told.split(","))))  # noqa: B905  (Python 3.9)


def _slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "card"


class Worker:
    """A process with PyTorch and TVM's runtime in it, and its conversation of lines of JSON."""

    def __init__(self, folder: Path, options: argparse.Namespace, out: Path, seconds: float) -> None:
        read, write = os.pipe()
        command = [sys.executable, str(folder / "gpu_slot.py"), "measure", "--worker", str(write)]
        command += ["--rehearsal"] if options.rehearsal else []
        for each in options.runtime:
            command += ["--runtime", str(each)]
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "PYTHONUNBUFFERED": "1"}
        out.mkdir(parents=True, exist_ok=True)
        self._log = (out / "worker.log").open("ab")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[write],
            env={**cache, **os.environ},
            start_new_session=True,
        )
        os.close(write)
        self._answers, self._rest = read, b""
        told = self.answer(seconds)
        if "machine" not in told:
            self.end()
            if told.get("late") and seconds < START_SECONDS:
                raise TimeIsUp
            raise Refused(told.get("refused") or f"the worker does not start: see {out / 'worker.log'}")
        self.machine: Row = told["machine"]

    def ask(self, order: Row, seconds: float) -> Row:
        self.tell(order)
        return self.answer(seconds)

    def tell(self, order: Row) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended meanwhile, which its answer will say
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> Row:
        """What it says; "late" if that is nothing so far, "lost" if it is of no more use."""
        end = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = max(0.0, end - time.monotonic())
            ready, _, _ = select.select([self._answers], [], [], min(left, 3600.0))
            if not ready and left <= 3600.0:
                return {"error": f"not ready after {seconds:.0f} s", "lost": True, "late": True}
            data = os.read(self._answers, 65536) if ready else b""
            if ready and not data:
                return {"error": f"its process ended with status {self._process.wait()}", "lost": True}
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))

    def end(self) -> None:
        _kill(self._process)
        os.close(self._answers)
        self._log.close()


# Telling ----------------------------------------------------------------------


def show(options: argparse.Namespace) -> int:
    """The table of every card that there are results of, from this archive."""
    here = Path(__file__).resolve().parent
    manifest = read_manifest(here)
    places = sorted(path.parent for path in (options.results or here).glob(f"*-{digest(manifest)}/{RESULTS}"))
    if not places:
        raise Refused("there are no results: give the folder of measure's with --results")
    for place in places:
        print(table(manifest, rows_of(place / RESULTS), place))
    return 0


def table(manifest: Row, rows: Sequence[Row], out: Path) -> str:
    """The results so far."""
    lines = [f"# {out.name}", ""]
    with contextlib.suppress(OSError, ValueError):
        machine = json.loads((out / MACHINE).read_text())
        lines += [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    checks = [row for row in rows if row["order"]["do"] == "check"]
    right = sum("error" not in row for row in checks)
    limits = [f"{row['order']['name']} {row['rate']:.0f} {row['unit']}" for row in rows if "rate" in row]
    lines += [f"Of {len(checks)} artifacts that were checked {right} are right.", ""]
    lines += [f"Reached here: {', '.join(limits) or 'not measured'}.", ""]
    columns = ["model", "batch", "arithmetic", "contender", "ms", "p10", "p90", "in a row", "ours / its", "turns"]
    columns += ["deviation", "remarks"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in groups(manifest):
        for contender in CONTENDERS:
            lines += _line(manifest, rows, group, contender)
    failed = [f"{' '.join(map(str, row['order'].values()))}: {row['error']}" for row in checks if "error" in row]
    return "\n".join([*lines, "", *failed]).rstrip() + "\n"


def _turns(rows: Sequence[Row], group: Row, contender: str) -> list[Row]:
    wanted = {"do": "turn", **group, "contender": contender}
    return [row for row in rows if wanted.items() <= row["order"].items()]


def _line(manifest: Row, rows: Sequence[Row], group: Row, contender: str) -> list[str]:
    turns = _turns(rows, group, contender)
    if not turns:
        return []
    head = f"| {group['model']} | {group['batch']} | {group['dtype']} | {contender} |"
    timed = [row for row in turns if "median_ms" in row]
    if not timed:
        return [f"{head}{' |' * 7} {turns[0]['error']} |"]

    def middle(key: str) -> float:
        return statistics.median(row[key] for row in timed)

    cells = [f"{middle(key):.4g}" for key in ("median_ms", "p10_ms", "p90_ms", "in_a_row_ms")]
    mine = [row for row in _turns(rows, group, OURS) if "median_ms" in row]
    alike = [row for row in mine if ("beside" in row) == ("beside" in timed[0])] or mine  # as disturbed as its were
    ours = [row["median_ms"] for row in alike]
    cells += [f"{statistics.median(ours) / middle('median_ms'):.2f}" if ours else "", str(len(timed))]
    whose = {**group, "contender": contender}
    deviations = [row["deviation"] for row in rows if "deviation" in row and whose.items() <= row["order"].items()]
    cells += [f"{max(deviations):.1e}" if deviations else ""]
    return [f"{head} {' | '.join(cells)} | {_remark(manifest, group, contender, turns, middle('in_a_row_ms'))} |"]


def _remark(manifest: Row, group: Row, contender: str, turns: Sequence[Row], ms: float) -> str:
    """Ours: launches, and what of memory and arithmetic was reached; the bytes are what kernels read and write."""
    remarks = [str(row["error"]) for row in turns if "error" in row]
    if any("beside" in row for row in turns):
        remarks.append(f"while {MAX} searched")
    entry = artifact(manifest, {**group, "contender": contender})
    if entry is not None and "launches" in entry:
        rates = [f"{entry[key] / ms / 1e6:.0f} {unit}" for key, unit in (("bytes", "GB/s"), ("float_ops", "GFLOP/s"))]
        remarks += [f"{entry['launches']} launches", *rates]
    elif "ready_s" in turns[0]:
        remarks.append(f"ready after {turns[0]['ready_s']:.0f} s")
    return ", ".join(remarks)
