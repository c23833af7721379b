"""Candidates to be measured elsewhere, in one file; and what was found out there, back into the store.

The file holds compiled kernels, what they are, and the program that measures them (`runtime/offline.py`), which needs
Python and TVM's runtime only. Its results carry the manifest of the file, so they are enough to come back with.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import platform
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm import backends
from saevit_tvm.measure import offline
from saevit_tvm.measure.candidates import Builders, Built, Candidate, Result
from saevit_tvm.runtime import abi
from saevit_tvm.support.cpu import cores
from saevit_tvm.support.errors import TuningError, UsageError
from saevit_tvm.targets import Target
from saevit_tvm.tuning import replay
from saevit_tvm.tuning.store import Model, Store, Trial, Workload

if TYPE_CHECKING:
    from saevit_tvm.tuning.session import Session
    from saevit_tvm.tuning.task import Task

Say = Callable[[str], None]

PROGRAM = "run.py"
MODES: dict[str, Any] = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}  # by the end of the file's name
LARGEST = 1 << 30  # bytes of results that are read


# Out ------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What went into a file."""

    candidates: int
    kernels: int
    failed: int
    bytes: int


def check_name(path: Path) -> None:
    if path.suffix not in MODES or path.name.startswith(".") or path.is_dir():
        raise UsageError(
            f"'{path}' cannot be the file of candidates: give a name that ends in .tar, .tar.gz or .tar.xz."
        )


def export(
    session: Session,
    target: Target,
    count: int,
    path: Path,
    scratch: Path,
    *,
    folder: str,
    tolerance: float,
    runtime: Mapping[str, Path],
    say: Say,
) -> Exported:
    """Compile the most promising candidates and put them into one archive, in which they are in one folder."""
    chosen = session.proposals(count)
    say(f"compiling {len(chosen)} candidates of {len({task.workload.key for task, _ in chosen})} kernels")
    builders = Builders(target, scratch, cores())
    try:
        built, failures = _compiled(chosen, builders, say)
        tasks = {task.workload.key: task for task, _, _ in built}
        references = _references(tasks, builders) if backends.get(target.kind).is_gpu else {}
    finally:
        builders.pool.kill()
    if not built:
        raise _nothing_to_export(failures)
    files = _Files()
    kernels = {key: _kernel(task, references.get(key), files) for key, task in tasks.items()}
    manifest = {
        "what": offline.WHAT,
        "format": offline.FORMAT,
        "target": {
            "name": target.name,
            "fingerprint": session.store.fingerprint,
            "kind": target.kind,
            "tvm": target.tvm,
        },
        "model": asdict(session.models[0]),
        "tolerance": tolerance,
        "kernels": kernels,
        "candidates": [_entry(task, candidate, kernel, files) for task, candidate, kernel in built],
    }
    files.add(offline.MANIFEST, json.dumps(manifest, indent=1).encode())
    files.add(PROGRAM, Path(offline.__file__).read_bytes())
    for name, library in runtime.items():
        files.add(f"{offline.RUNTIME}/{name}", library.read_bytes())
    files.write(path, folder)
    return Exported(len(built), len(kernels), len(failures), path.stat().st_size)


def _nothing_to_export(failures: Sequence[Result]) -> TuningError:
    if failures:
        words = f"none of {len(failures)} compiles; the last one's own words: {failures[-1].words}"
    else:
        words = "every schedule was measured already; 'saevit-tvm build' uses the best."
    return TuningError(f"there is no candidate to export: {words}")


def _compiled(
    chosen: Sequence[tuple[Task, Candidate]], builders: Builders, say: Say
) -> tuple[list[tuple[Task, Candidate, Built]], list[Result]]:
    """The candidates that compile, in the order given, and why the others do not."""
    found: dict[str, Built] = {}
    failures: list[Result] = []
    for candidate, outcome in builders.build([candidate for _, candidate in chosen], lambda: False):
        if isinstance(outcome, Built):
            found[candidate.key] = outcome
        else:
            failures.append(outcome)
        if (len(found) + len(failures)) % 50 == 0:
            say(f"compiled {len(found)} of {len(chosen)}")
    return [(task, each, found[each.key]) for task, each in chosen if each.key in found], failures


def _references(tasks: Mapping[str, Task], builders: Builders) -> dict[str, Built]:
    """Each kernel of a GPU with the tiling that it has by default: what all others must agree with.

    For a CPU the weights lie in memory as the tiling wants them, so there is nothing that two could be compared on.
    """
    plain = [Candidate(key, [], replay.as_text(task.kernel.module), None) for key, task in tasks.items()]
    found = {}
    for candidate, outcome in builders.build(plain, lambda: False):
        if isinstance(outcome, Result):
            name = tasks[candidate.key].kernel.name
            raise TuningError(f"the kernel '{name}' does not compile with its default tiling: {outcome.words}")
        found[candidate.key] = outcome
    return found


def _kernel(task: Task, reference: Built | None, files: _Files) -> dict[str, Any]:
    return {
        "name": task.kernel.name,
        "module": task.workload.module,
        "tvm": task.workload.tvm,
        "reference": files.library("references", reference.library) if reference else None,
    }


def _entry(task: Task, candidate: Candidate, built: Built, files: _Files) -> dict[str, Any]:
    return {
        "kernel": task.workload.key,
        "key": candidate.key,
        "trace": candidate.trace,
        "arguments": built.arguments,
        **files.library("candidates", built.library),
    }


class _Files:
    """What goes into the file of candidates."""

    def __init__(self) -> None:
        self._content: dict[str, bytes] = {}

    def add(self, name: str, data: bytes) -> None:
        self._content[name] = data

    def library(self, folder: str, path: Path) -> dict[str, Any]:
        """Where a library will be, and its digest."""
        data, name = path.read_bytes(), f"{folder}/{len(self._content):05d}.so"
        path.unlink()
        self.add(name, data)
        return {"file": name, "sha256": hashlib.sha256(data).hexdigest()}

    def write(self, path: Path, folder: str) -> None:
        """One archive with one folder; a path ends in what it is to be packed with."""
        with tarfile.open(path, MODES[path.suffix], format=tarfile.USTAR_FORMAT) as tar:
            for name, data in self._content.items():
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size, member.mode = len(data), 0o755 if name == PROGRAM else 0o644
                tar.addfile(member, io.BytesIO(data))


def runtime_libraries(target: Target, everything: bool) -> dict[str, Path]:
    """What of TVM's runtime goes along, by file name: all, or what no wheel has."""
    backend = backends.get(target.kind)
    ours = backend.own_libraries()
    if not everything:
        return ours
    if target.arch != platform.machine():
        raise UsageError(
            f"--with-runtime takes this machine's, and target '{target.name}' is {target.arch}: leave it out."
        )
    found = {path.name: path for path in (abi.library_path("tvm_ffi"), abi.library_path("tvm", "tvm_runtime"))}
    return found | ours | backend.runtime_libraries()


# Back -----------------------------------------------------------------------


@dataclass(frozen=True)
class Recovered:
    """What was found whole in a file of results, and how many lines were left out."""

    manifest: dict[str, Any]
    results: list[tuple[dict[str, Any], dict[str, Any]]]  # a candidate's record, and the machine
    damaged: int

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["target"]["fingerprint"])

    @property
    def machines(self) -> list[dict[str, Any]]:
        """Where it was measured, each machine once."""
        return list({json.dumps(machine, sort_keys=True): machine for _, machine in self.results}.values())


def read_results(path: Path) -> Recovered:
    """What `run.py` wrote, by itself or in a tar; a TuningError in one sentence for anything else.

    A damaged line costs itself, as `run.py` has it, too. If it may have named another machine, then also what follows,
    up to the next line that names one: times are worth little when nobody knows whose they are.
    """
    whole = _content(path)
    lines = whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)  # the last one may have been cut off by a kill
    first = offline.decoded(lines[0]) if lines else None
    if first is None or first.get("kind") != "bundle":
        raise TuningError(f"'{path}' has no results of run.py: give the {offline.RESULTS} that it wrote, whole.")
    machine: dict[str, Any] | None = None
    results, damaged = [], 0
    try:
        manifest = _manifest(first)
        for number, line in enumerate(lines[1:], 2):
            record = offline.decoded(line)
            if record is None:
                damaged += 1
                machine = machine if b'"kind":"result"' in line and b'"kind":"run"' not in line else None
            elif record["kind"] == "run":
                machine = _machine(record["machine"])
            elif record["candidate"] not in range(len(manifest["candidates"])):
                raise ValueError(f"line {number} is of no candidate")
            elif machine is None:
                damaged += 1
            else:
                results.append((record, machine))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TuningError(f"'{path}' is damaged ({error}), so nothing was taken from it: copy it again.") from error
    return Recovered(manifest, results, damaged)


def _content(path: Path) -> bytes:
    """The results in a file, or in a tar of the folder that they are in."""
    try:
        if not tarfile.is_tarfile(path):
            return path.read_bytes()
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(offline.RESULTS) and member.size <= LARGEST:
                    file = tar.extractfile(member)
                    assert file is not None
                    return file.read()
    except (OSError, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise TuningError(
            f"'{path}' cannot be read ({words}): give the {offline.RESULTS} that run.py wrote."
        ) from error
    raise TuningError(f"'{path}' has no {offline.RESULTS} in it: run its run.py first, and give what that wrote.")


def _manifest(first: dict[str, Any]) -> dict[str, Any]:
    text = first["manifest"]
    if offline.digest(text) != first["bundle"]:
        raise ValueError("its manifest is not the one that was measured")
    manifest = json.loads(text)
    if manifest["what"] != offline.WHAT or manifest["format"] != offline.FORMAT:
        raise ValueError(f"it has format {manifest['format']}, and this saevit-tvm reads {offline.FORMAT}")
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", manifest["target"]["fingerprint"]):
        raise ValueError("its target has no name")
    for candidate in manifest["candidates"]:
        _ = manifest["kernels"][candidate["kernel"]]["module"], candidate["key"], candidate["trace"]
    _model(manifest)
    return dict(manifest)


def _model(manifest: dict[str, Any]) -> Model:
    entry = manifest["model"]
    return Model(**{**entry, "input_shape": tuple(entry["input_shape"]), "versions": dict(entry["versions"])})


def _machine(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Where it was measured, as records say it."""
    if not {"id", "cpu", "cores"} <= entry.keys():
        raise ValueError("it does not say where it was measured")
    return {str(name): value if isinstance(value, int) else str(value) for name, value in entry.items()}


def take(recovered: Recovered, root: Path, scratch: Path) -> tuple[Store, Counter[str]]:
    """Put results into the store below `root`: "new" trials, those "known" already, and how many of all "failed"."""
    manifest, trials = recovered.manifest, _trials(recovered)
    workloads = [
        Workload(key, str(each["name"]), str(each["module"]), str(each["tvm"]))
        for key, each in manifest["kernels"].items()
    ]
    brought, store = Store(scratch, recovered.fingerprint), Store(root, recovered.fingerprint)
    brought.fill(_model(manifest), workloads, trials)
    store.repair()
    new = store.merge(brought)
    failed = sum(not trial.valid for trial in trials)
    return store, Counter(new=new, known=len(trials) - new, failed=failed, valid=len(trials) - failed)


def _trials(recovered: Recovered) -> list[Trial]:
    """Every result as a trial, once its trace has been seen to make the very kernel that was measured."""
    manifest = recovered.manifest
    kernels: dict[str, Any] = {}
    for key, kernel in manifest["kernels"].items():
        kernels[key] = replay.unpack_workload(kernel["module"])
        if kernels[key] is None or replay.module_key(kernels[key].mod) != key:
            raise _of_another_version(manifest)
    trials = []
    for record, machine in recovered.results:
        candidate = manifest["candidates"][int(record["candidate"])]
        schedule = replay.apply(kernels[candidate["kernel"]], candidate["trace"])
        if schedule is None or replay.module_key(schedule.mod) != candidate["key"]:
            raise _of_another_version(manifest)
        try:
            trials.append(_trial(manifest, candidate, record, machine))
        except (KeyError, TypeError, ValueError) as error:
            raise TuningError(f"the results are damaged ({error}), so nothing was taken: copy them again.") from error
    return trials


def _trial(
    manifest: dict[str, Any], candidate: dict[str, Any], record: dict[str, Any], machine: dict[str, Any]
) -> Trial:
    failure = record["failure"]
    if bool(record["run_secs"]) == bool(failure):
        raise ValueError("a result is neither times nor a failure")
    return Trial(
        workload=candidate["kernel"],
        candidate=candidate["key"],
        trace=candidate["trace"],
        run_secs=tuple(float(seconds) for seconds in record["run_secs"]),
        failure=str(failure) if failure else None,
        words=str(record["words"]) if failure else None,
        model=str(manifest["model"]["name"]),
        task=str(manifest["kernels"][candidate["kernel"]]["name"]),
        target=str(manifest["target"]["fingerprint"]),
        machine=machine,
        versions=dict(manifest["model"]["versions"]),
        time=str(record["time"]),
    )


def _of_another_version(manifest: dict[str, Any]) -> TuningError:
    versions = ", ".join(f"{name} {number}" for name, number in manifest["model"]["versions"].items())
    return TuningError(
        f"the kernels that were measured are not this version's (they were exported by {versions}), so nothing was "
        "taken: export and measure them again."
    )
