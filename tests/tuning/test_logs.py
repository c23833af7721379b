"""`saevit-tvm logs` on a store of a real search, as a user's shell sees it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from saevit_tvm.runtime.manifest import schema
from saevit_tvm.targets import Target
from saevit_tvm.tuning.log import Log, encode
from saevit_tvm.tuning.store import ASIDE_NAME, Store
from saevit_tvm.verbs import logs as verb

pytestmark = pytest.mark.slow

TRIALS = 10  # in the store of `root`
Cli = Callable[..., subprocess.CompletedProcess[str]]


def told(cli: Cli, *arguments: str | Path, status: int = 0) -> dict[str, Any]:
    """The one object on stdout, by its schema."""
    done = cli("logs", *arguments, "--json")
    assert done.returncode == status, done.stderr
    result = json.loads(done.stdout)
    jsonschema.validate(result, schema(f"logs-{arguments[0]}"))
    return result


def said(cli: Cli, *arguments: str | Path, status: int = 0) -> str:
    done = cli("logs", *arguments)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def own(result: dict[str, Any]) -> dict[str, Any]:
    (row,) = (row for row in result["fingerprints"] if row["origin"] == "own")
    return row


def test_list_tells_what_is_there(cli: Cli, root: Path, tmp_path: Path, target: Target) -> None:
    row = own(told(cli, "list", "--store", root))
    assert (row["fingerprint"], row["trials"], row["kernels"]) == (target.fingerprint, TRIALS, 1)
    (model,) = row["models"]
    store = Store(root, target)
    assert model["best_ms"] == pytest.approx(2e3 * store.fastest(next(iter(store.workloads)))[0].seconds)
    table = said(cli, "list", "--store", root)
    assert target.fingerprint in table and f"{model['best_ms']:.3f} ms" in table
    assert "own" not in said(cli, "list", "--store", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_show_tells_who_measured_what(cli: Cli, root: Path, target: Target) -> None:
    store = Store(root, target)
    (key,) = store.workloads
    crashed = dataclasses.replace(store.of(key)[0], candidate="0x1", run_secs=(), failure="run crashed", words="ouch")
    store.add(crashed, store.workloads[key])
    result = told(cli, "show", target.fingerprint, "--store", root, "--model", "test")
    (kernel,), (model,) = result["kernels"], result["models"]
    curve = [point["best_ms"] for point in model["curve"]]
    assert curve == sorted(curve, reverse=True) and curve[-1] == pytest.approx(model["best_ms"])
    assert (kernel["name"], kernel["calls"], kernel["models"]) == ("matmul", 2, ["test"])
    failures = Counter(trial.failure for trial in store.of(key) if trial.failure)  # a busy machine may add its own
    assert failures["run crashed"] == 1
    assert (kernel["trials"], kernel["failures"], kernel["last_words"]) == (TRIALS + 1, failures, "ouch")
    best = store.fastest(key)[0]
    assert kernel["best"] == {
        "trace": best.trace,
        "machine": best.machine,
        "versions": best.versions,
        "time": best.time,
    }
    text = said(cli, "show", target.fingerprint, "--store", root)
    assert "run crashed 1" in text and f"{TRIALS + 1} trials by {best.machine['id']}" in text


def test_wrong_names_are_one_sentence(cli: Cli, root: Path, tmp_path: Path, target: Target) -> None:
    for arguments, status, words in (
        (("show", "x86_64", "--store", root), 2, "unknown fingerprint 'x86_64'"),
        (("show", target.fingerprint, "--model", "tset", "--store", root), 2, "did you mean 'test'?"),
        (("lsit",), 2, "did you mean 'list'?"),
        (("check", "--store", tmp_path / "none"), 1, "there are no tuning records in"),
        (("merge", tmp_path, "--into", tmp_path / "none"), 1, "there are no tuning records in"),
        (("merge", root, "--into", root), 2, "cannot be merged into itself"),
    ):
        done = cli("logs", *arguments)
        assert (done.returncode, done.stdout) == (status, "")
        assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "none").exists()


def checked(root: Path, *, repair: bool = False) -> dict[str, Any]:
    result = verb.check(root, None, repair=repair, say=lambda _line: None)
    jsonschema.validate(result, schema("logs-check"))
    return result["fingerprints"][0]


def test_check_finds_damage_and_repairs_it(cli: Cli, root: Path, target: Target) -> None:
    assert checked(root)["damaged"] is False
    log = Log(Store(root, target).path)
    log.append([{"kind": "trial", "format": 99}, {"kind": "workload", "format": 1}])
    with log.path.open("ab") as file:
        file.write(encode({"n": 1}).replace(b'"n":1', b'"n":2') + b"half a rec")
    before = log.path.read_bytes()
    row = checked(root)
    assert (row["torn_bytes"], row["broken_lines"], row["unreadable"], row["set_aside"]) == (10, 1, 2, None)
    assert "--repair would" in said(cli, "check", "--store", root, status=1)
    assert log.path.read_bytes() == before, "looking changes nothing"
    assert "3 lines are now in" in said(cli, "check", "--store", root, "--repair")
    assert log.path.with_name(ASIDE_NAME).read_bytes().count(b"\n") == 3
    assert checked(root)["damaged"] is False
    assert sum(map(len, Store(root, target).trials.values())) == TRIALS


def test_trials_that_no_longer_apply_are_told_but_no_damage(root: Path, target: Target) -> None:
    store = Store(root, target)
    (key,) = store.workloads
    stale = dataclasses.replace(store.of(key)[0], candidate="0x1", trace=[[["Nonsense", [], [], []]], []])
    store.add(stale, store.workloads[key])
    row = checked(root)
    assert (row["outdated_trials"], row["damaged"]) == (1, False)


def test_merge_and_prune_make_a_small_store_of_the_best(cli: Cli, root: Path, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    assert told(cli, "merge", root, "--into", shipped, "--best", "2")["fingerprints"][0]["added"] == 2
    assert f"{TRIALS - 2} trials added, {TRIALS} in all" in said(cli, "merge", root, "--into", shipped)
    (row,) = told(cli, "prune", "--best", "3", "--store", shipped)["fingerprints"]
    assert (row["removed"], row["trials"], row["pruned"]) == (TRIALS - 3, TRIALS, TRIALS - 3)
    assert row["bytes"] < row["bytes_before"]
