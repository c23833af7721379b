"""Candidates measured elsewhere: exported, measured by a program with nothing but TVM's runtime, taken back."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from saevit_tvm import targets
from saevit_tvm.backends import fatbin, nvrtc
from saevit_tvm.measure import offline
from saevit_tvm.runtime import cuda, opencl
from saevit_tvm.runtime.manifest import schema
from saevit_tvm.support.errors import TuningError
from saevit_tvm.tuning import bundle
from saevit_tvm.tuning.store import Store

MICRO = ["--model", "saevit_micro", "--image-size", "32"]
HERE = "generic-opencl" if opencl.available()[0] else "native"
needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
without_gpu = pytest.mark.skipif(cuda.available()[0], reason="this machine has a GPU")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The bundle's own program, by a Python that finds no package: neither this one nor TVM's nor NumPy."""
    line = [sys.executable, "-I", "-S", str(folder / "run.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env={"PATH": os.environ["PATH"]})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Any]) -> Path:
    """Twelve candidates of the smallest model, with the runtime, unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    done = cli(
        *["tune", "--target", HERE, *MICRO, "--export-candidates", folder / "micro.tar.xz", "--trials", "12"],
        *["--with-runtime", "--store", folder / "store", "--json"],
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    jsonschema.validate(told, schema("tune-export"))
    assert told["candidates"] == 12 and told["failed"] == 0 and not list(folder.glob(".saevit*"))
    assert told["bytes"] == (folder / "micro.tar.xz").stat().st_size < 4_000_000
    with tarfile.open(folder / "micro.tar.xz") as tar:
        tar.extractall(folder)
    return folder / "micro"


@pytest.fixture(scope="module")
def measured(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its results, from a run that was killed again and again."""
    folder = tmp_path_factory.mktemp("measured") / "micro"
    shutil.copytree(exported, folder)
    results, wanted = folder / "results.jsonl", 3
    while wanted < 12:
        line = [sys.executable, "-I", "-S", str(folder / "run.py")]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env={"PATH": os.environ["PATH"]})
        end = time.monotonic() + 60
        while counted(results) < wanted and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert counted(results) >= wanted
        process.send_signal(signal.SIGKILL)
        process.wait()
        with results.open("ab") as file:  # what a kill in the middle of a write leaves
            file.write(b'{"check":"0123')
        wanted += 4
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 candidates have a result" in done.stdout
    return results


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    sentence = done.stderr.splitlines()[-1]
    assert done.returncode == status and done.stdout == "" and sentence.startswith("saevit-tvm: "), done.stderr
    assert all(word in sentence for word in words), sentence


def counted(results: Path) -> int:
    return results.read_bytes().count(b'"kind":"result"') if results.exists() else 0


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [record for record in map(offline.decoded, results.read_bytes().splitlines(keepends=True)) if record]


def test_the_program_needs_only_python() -> None:
    tree = ast.parse(Path(offline.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert imported <= set(sys.stdlib_module_names)


@pytest.mark.slow
def test_kills_cost_nothing_that_was_measured(measured: Path) -> None:
    records = lines_of(measured)
    done = [record["candidate"] for record in records if record["kind"] == "result"]
    assert done == list(range(12))  # each once, in the order of the file
    assert all(len(record["run_secs"]) >= 1 for record in records if record["kind"] == "result")
    runs = [record for record in records if record["kind"] == "run"]
    assert len(runs) == 4 and runs[0]["machine"]["id"] == runs[-1]["machine"]["id"]
    errors = [record["error"] for record in records if record["kind"] == "result"]
    assert all(error is not None and error < 1e-5 for error in errors) or HERE == "native"
    again = run(measured.parent)
    assert again.returncode == 0 and "0 were measured now" in again.stdout and lines_of(measured) == records


@pytest.mark.slow
def test_a_build_uses_what_was_brought_back(measured: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    chosen = ["--store", tmp_path / "store"]
    refused(cli("tune", "--target", "x86-64-v4", "--import-results", measured, *chosen), 2, "x86-64-v4", "leave out")
    taken = json.loads(cli("tune", "--import-results", measured, *chosen, "--json").stdout)
    jsonschema.validate(taken, schema("tune-import"))
    assert (taken["new"], taken["known"], taken["valid"], taken["failed"]) == (12, 0, 12, 0)
    with tarfile.open(tmp_path / "back.tar", "w") as tar:
        tar.add(measured.parent, "micro")
    again = json.loads(cli("tune", "--import-results", tmp_path / "back.tar", *chosen, "--json").stdout)
    assert (again["new"], again["known"]) == (0, 12)
    about, machine, first, *others = measured.read_bytes().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_bytes(b"".join([about, machine, first.replace(b"1", b"2"), *others]))
    partly = cli("tune", "--import-results", tmp_path / "results.jsonl", "--store", tmp_path / "other", "--json")
    assert json.loads(partly.stdout)["new"] == 11 and json.loads(partly.stdout)["damaged"] == 1
    (warning,) = partly.stderr.splitlines()
    assert warning.startswith("warning: 1 lines of") and "copy the file again" in warning
    store = Store(tmp_path / "store", targets.get(HERE))
    trials = [trial for key in store.trials for trial in store.of(key)]
    assert len({trial.identity for trial in trials}) == len(trials) == 12
    if HERE == "generic-opencl":
        (device, *_) = opencl.devices()
        assert all(trial.machine["device"] == device.name and trial.machine["driver"] for trial in trials)
    built = cli("build", "--target", HERE, *MICRO, *chosen, "--out", tmp_path, "--json")
    assert built.returncode == 0, built.stderr
    manifest = json.loads(Path(json.loads(built.stdout)["manifest"]).read_text())
    assert manifest["kernels"]["tuned"] >= len(store.trials) and manifest["verification"]["passed"]


@pytest.mark.slow
def test_what_is_measured_is_not_proposed_again(root: Path, target: targets.Target, matmul: Callable[..., Any]) -> None:
    from saevit_tvm.tuning.session import Session

    store = Store(root, target)
    known = {trial.candidate for trials in store.trials.values() for trial in trials}
    proposed = Session([matmul()], target, store, model="test").proposals(6)
    assert len({candidate.key for _, candidate in proposed} - known) == 6


def test_the_default_is_proposed_first_and_once(
    tmp_path: Path, target: targets.Target, matmul: Callable[..., Any]
) -> None:
    """Of a kernel whose schedules are all known beforehand; what the store has of them is not made again."""
    from tvm.s_tir import Schedule
    from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

    from saevit_tvm.tuning.session import Session
    from saevit_tvm.tuning.store import Trial, now

    def schedules(schedule: Schedule) -> list[Schedule]:
        made = [Schedule(schedule.mod) for _ in (2, 4, 8)]
        for one, lanes in zip(made, (2, 4, 8), strict=True):
            one.vectorize(one.split(one.get_loops(one.get_sblock("C"))[1], [None, lanes])[1])
        return made

    def proposals() -> list[Any]:
        space = ScheduleFn(schedules, [], [], {})
        session = Session([matmul()], target, Store(tmp_path, target), model="test", space_for=lambda _: space)
        return session.proposals(9)

    (task, first), *others = proposals()
    assert [first.key] == [each.key for each in task.default()] and len(others) == 2
    told = {"model": "test", "task": "matmul", "target": target.fingerprint, "machine": {}, "versions": {}}
    trial = Trial(task.workload.key, first.key, first.trace, (1e-3,), None, None, **told, time=now())
    Store(tmp_path, target).add(trial, task.workload)
    assert {each.key for _, each in proposals()} == {each.key for _, each in others}


@pytest.mark.slow
def test_a_candidate_that_crashes_or_lies_costs_only_itself(exported: Path, tmp_path: Path) -> None:
    """One library kills its process, another does nothing at all or hangs, a third computes something else."""
    if HERE == "native":
        pytest.skip("needs kernels with a reference")
    folder = tmp_path / "micro"
    shutil.copytree(exported, folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    candidates, kernels = manifest["candidates"], manifest["kernels"]
    source = tmp_path / "bad.c"
    for index, body in ((3, "*(volatile int *)0 = 1;"), (5, f'while (!access("{tmp_path}/hang", 0));')):
        call = f"int __tvm_ffi_main(void *s, void *a, int n, void *r) {{ {body} return 0; }}"
        source.write_text(f"extern int access(const char *path, int mode);\n{call}")
        place = folder / candidates[index]["file"]
        subprocess.run(["cc", "-shared", "-fPIC", "-o", place, source], check=True)
    wrong = folder / candidates[7]["file"]
    wrong.write_bytes(wrong.read_bytes().replace(b"= 0.000000e+00f", b"= 1.000000e+00f"))  # where its sums begin
    for index in (3, 5, 7):
        candidates[index]["sha256"] = _sha256(folder / candidates[index]["file"])
    kernels[candidates[4]["kernel"]]["reference"] = None
    (folder / "bundle.json").write_text(json.dumps(manifest))
    done = run(folder)
    assert done.returncode == 0, done.stderr
    results = {
        record["candidate"]: record for record in lines_of(folder / "results.jsonl") if record["kind"] == "result"
    }
    assert len(results) == 12
    assert results[3]["failure"] == "run crashed" and "signal 11" in results[3]["words"]
    assert results[5]["failure"] == "run failed" and "unwritten" in results[5]["words"]
    assert results[7]["failure"] == "run failed" and "deviates from the reference's" in results[7]["words"]
    assert sum(bool(record["run_secs"]) for record in results.values()) == 9
    # With nothing left but failures it is an error, and they are not written down: it may be the machine.
    path = folder / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (offline.decoded(line) or {}).get("failure") is None]
    path.write_bytes(b"".join(kept))
    (tmp_path / "hang").touch()
    (folder / "run.py").write_text(Path(offline.__file__).read_text().replace("_SECONDS = 60.0", "_SECONDS = 4.0"))
    again = run(folder)
    assert again.returncode == 1 and len(again.stderr.splitlines()) == 1, again.stderr
    assert "none of 3 candidates could be measured" in again.stderr and counted(path) == 9
    assert "run timed out" in again.stdout


@pytest.mark.slow
def test_a_damaged_bundle_is_a_sentence(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "micro"
    shutil.copytree(exported, folder)
    library = folder / json.loads((folder / "bundle.json").read_text())["candidates"][0]["file"]
    library.write_bytes(library.read_bytes()[:-1])
    done = run(folder)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "is missing or damaged" in done.stderr
    (folder / "bundle.json").write_text("{")
    done = run(folder)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "cannot be read" in done.stderr


# What comes back -----------------------------------------------------------


@pytest.mark.slow
def test_results_of_kernels_that_are_not_ours_are_refused(measured: Path, tmp_path: Path) -> None:
    first, *rest = lines_of(measured)
    manifest = json.loads(first["manifest"])
    one, other = manifest["candidates"][:2]
    one["key"], other["key"] = other["key"], one["key"]
    first["manifest"] = json.dumps(manifest)
    first["bundle"] = offline.digest(first["manifest"])
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(map(offline.encoded, [first, *rest])))
    with pytest.raises(TuningError, match=r"are not this version's .* export and measure them again"):
        bundle.take(bundle.read_results(path), tmp_path / "store", tmp_path / "scratch")
    assert not list((tmp_path / "store").glob("*/records.jsonl"))


def test_results_of_another_bundle_are_not_mixed(tmp_path: Path) -> None:
    text = json.dumps({"what": offline.WHAT, "format": 1, "target": {"kind": "llvm"}, "candidates": []})
    (tmp_path / "bundle.json").write_text(text)
    offline.Results(tmp_path / "r.jsonl", offline.Bundle(tmp_path))
    (tmp_path / "bundle.json").write_text(text + " ")
    with pytest.raises(offline.Failure, match="the results of other candidates"):
        offline.Results(tmp_path / "r.jsonl", offline.Bundle(tmp_path))


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    shutil.copy(offline.__file__, tmp_path / "run.py")
    manifest = {"what": offline.WHAT, "format": 1, "target": {"kind": "llvm"}, "kernels": {}, "candidates": []}
    (tmp_path / "bundle.json").write_text(json.dumps(manifest | {"long": "x" * 2000}))
    line = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable, "-I", "-S", str(tmp_path / "run.py")]
    full = subprocess.run(line, capture_output=True, text=True, timeout=60)
    (sentence,) = full.stderr.splitlines()
    assert full.returncode == 1 and "cannot be written (File too large): the same command goes on" in sentence
    assert run(tmp_path).returncode == 0 and len(lines_of(tmp_path / "results.jsonl")) == 1


def test_two_programs_do_not_write_one_file(tmp_path: Path) -> None:
    text = json.dumps({"what": offline.WHAT, "format": 1, "target": {"kind": "llvm"}, "candidates": []})
    (tmp_path / "bundle.json").write_text(text)
    first = offline.Results(tmp_path / "r.jsonl", offline.Bundle(tmp_path))
    before = first.path.read_bytes()
    with pytest.raises(offline.Failure, match=r"is being written by another run\.py: wait"):
        offline.Results(first.path, offline.Bundle(tmp_path))
    assert before and first.path.read_bytes() == before


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_results_are_a_sentence_and_take_nothing(data: st.DataObject, measured: Path, tmp_path: Path) -> None:
    """Cut anywhere, with bytes changed, or with whole lines gone: what is read is what was written, or an error."""
    whole = measured.read_bytes()
    good = {record["candidate"]: record["run_secs"] for record in lines_of(measured) if record["kind"] == "result"}
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for at in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=3)):
        if damaged:
            damaged[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "results.jsonl"
    path.write_bytes(bytes(damaged))
    try:
        found = bundle.read_results(path)
    except TuningError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(good[record["candidate"]] == record["run_secs"] for record, _ in found.results)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def little() -> list[dict[str, Any]]:
    """The lines of a small file of results."""
    manifest = json.dumps(
        {
            "what": offline.WHAT,
            "format": 1,
            "target": {"fingerprint": "x"},
            "kernels": {"k": {"name": "k", "tvm": "", "module": ""}},
            "model": {"name": "", "input_shape": [], "kernels": {}, "target": {}, "versions": {}, "time": ""},
            "candidates": [{"kernel": "k", "key": "c", "trace": []}],
        }
    )
    return [
        {"kind": "bundle", "bundle": offline.digest(manifest), "manifest": manifest},
        {"kind": "run", "machine": {"id": "a", "cpu": "b", "cores": 1}},
        {"kind": "result", "candidate": 0, "run_secs": [1e-6], "failure": None, "words": None, "time": "now"},
    ]


@pytest.mark.parametrize(
    ("at", "old", "new", "kept", "lost"),
    [
        (3, b'"time"', b'"tine"', "aabb", 1),  # a result
        (5, b'"machine"', b'"nachine"', "aaa", 3),  # where the following were measured
        (5, b'"run"', b'"rum"', "aaa", 3),
        (1, b'"cores"', b'"sores"', "bb", 4),
        (4, b"\n", b"", "aa", 3),  # together with the line after it
        (7, b"\n", b"", "aaab", 0),  # cut off
    ],
)
def test_a_damaged_line_costs_itself_and_no_result_gets_another_machine(
    at: int, old: bytes, new: bytes, kept: str, lost: int, little: list[dict[str, Any]], tmp_path: Path
) -> None:
    bundle_line, run_line, result = little
    other = {"kind": "run", "machine": {"id": "b", "cpu": "b", "cores": 1}}
    lines = [*map(offline.encoded, [bundle_line, run_line, *[result] * 3, other, result, result])]
    lines[at] = lines[at].replace(old, new, 1)
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines))
    found = bundle.read_results(tmp_path / "results.jsonl")
    assert "".join(machine["id"] for _, machine in found.results) == kept and found.damaged == lost


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(["kind", "machine", "candidate", "run_secs", "failure", "manifest", "bundle"]), value=JSON)
def test_lines_that_say_nonsense_are_a_sentence(
    field: str, value: Any, little: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Each line is whole and has its checksum; what it says is another matter."""
    lines = [dict(line) for line in little]
    for line in lines:
        if field in line:
            line[field] = value
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(map(offline.encoded, lines)))
    try:
        found = bundle.read_results(path)
        assert len(found.results) <= 1
        bundle.take(found, tmp_path / "store", tmp_path / "scratch")
    except TuningError as error:
        assert len(str(error).splitlines()) == 1
    assert not list((tmp_path / "store").glob("*/records.jsonl"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
@example(data=b'{"check":"0123456789abcdef","record":{"kind":NaN}}\n')
def test_any_file_is_results_or_a_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(data)
    with pytest.raises(TuningError, match="give the"):
        bundle.read_results(path)


@pytest.mark.parametrize("end", ["gz", "xz"])
def test_a_damaged_archive_is_a_sentence(end: str, tmp_path: Path) -> None:
    path, results = tmp_path / f"back.tar.{end}", tmp_path / "results.jsonl"
    results.write_bytes(bytes(range(256)) * 2000 + random.Random(1).randbytes(100_000))
    with tarfile.open(path, bundle.MODES[f".{end}"]) as tar:
        tar.add(results, "micro/results.jsonl")
    whole = path.read_bytes()
    for at in range(1000, len(whole) - 1000, len(whole) // 20):
        path.write_bytes(whole[:at] + bytes(each ^ 0x55 for each in whole[at : at + 64]) + whole[at + 64 :])
        with pytest.raises(TuningError, match="give the"):
            bundle.read_results(path)


def test_wrong_usage(cli: Callable[..., Any], tmp_path: Path) -> None:
    refused(cli("tune", "--export-candidates", "x.zip"), 2, "x.zip", ".tar.xz")
    refused(cli("tune", "--export-candidates", ".tar.xz"), 2, ".tar.xz", "give a name")
    refused(cli("tune", "--with-runtime"), 2, "--export-candidates")
    refused(
        cli("tune", "--target", "rpi5", "--with-runtime", "--export-candidates", "x.tar"), 2, "rpi5", "leave it out"
    )
    refused(cli("tune", "--export-candidates", "x.tar", "--measure", "qemu"), 2, "--measure", "leave it out")
    refused(cli("tune", "--import-results", "x", "--trials", "3"), 2, "--trials")
    refused(cli("tune", "--import-results", tmp_path / "none"), 1, "none", "No such file")


# For a GPU that is not here --------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_candidates_for_cuda_hold_machine_code(cli: Callable[..., Any], tmp_path: Path) -> None:
    line = ["tune", "--target", "cuda-sm_90", *MICRO, "--trials", "3", "--with-runtime", "--store", tmp_path / "store"]
    done = cli(*line, "--export-candidates", tmp_path / "gpu.tar")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "gpu.tar") as tar:
        tar.extractall(tmp_path)
    folder = tmp_path / "gpu"
    assert {"libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_cuda.so", "libcudart.so.13"} == {
        each.name for each in (folder / "runtime").iterdir()
    }
    libraries = [*(folder / "candidates").iterdir(), *(folder / "references").iterdir()]
    assert len(libraries) == 6
    for library in libraries:
        data = library.read_bytes()
        (found,) = fatbin.find(data)
        assert [(entry.kind, entry.architecture) for entry in found] == [("cubin", 90)]
        assert b"__global__" not in data and found[0].kernels()
    if not cuda.available()[0]:
        done = run(folder)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "libcuda.so.1" in done.stderr
        assert counted(folder / "results.jsonl") == 0


@needs_compiler
@without_gpu
def test_tuning_here_without_a_gpu_says_so(cli: Callable[..., Any]) -> None:
    words = ("cuda-sm_90", "needs an NVIDIA GPU", "--export-candidates")
    refused(cli("tune", "--target", "cuda-sm_90", *MICRO, "--trials", "1"), 1, *words)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
