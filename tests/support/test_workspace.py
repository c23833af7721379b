"""Temporary folders: what they leave behind, which is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from saevit_tvm.support import workspace
from saevit_tvm.support.errors import SaevitError, UsageError


def test_staging_makes_the_destination_and_leaves_only_what_was_placed(tmp_path):
    out = tmp_path / "a" / "b"
    with workspace.staging(out) as staged:
        (staged / "x").write_text("done")
        (staged / "rest").write_text("")
        workspace.place([(staged / "x", out / "x")])
    assert [path.name for path in out.iterdir()] == ["x"]


def test_failure_removes_what_was_made_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("")
    with pytest.raises(KeyboardInterrupt), workspace.staging(tmp_path / "a" / "b" / "c") as staged:
        (staged / "half").write_text("")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_what_tools_write_meanwhile_goes_into_scratch():
    before = tempfile.gettempdir()
    with workspace.scratch() as scratch:
        assert tempfile.mkdtemp().startswith(str(scratch))
        code = "import tempfile; print(tempfile.gettempdir())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(scratch)
    assert tempfile.gettempdir() == before and not scratch.exists()
    assert os.environ.get("TMPDIR", before) == before


def test_abandoning_removes_all_at_once(tmp_path):
    with workspace.staging(tmp_path / "new") as staged, workspace.scratch() as scratch:
        (staged / "x").write_text("")
        workspace.abandon()
        assert not scratch.exists() and not (tmp_path / "new").exists()
        (tmp_path / "new").mkdir()


def test_more_than_the_disk_has(tmp_path):
    with pytest.raises(SaevitError, match="make room"), workspace.staging(tmp_path / "new") as staged:
        workspace.reserve(staged, 1 << 50)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for destination in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UsageError, match="is not a directory"), workspace.staging(destination):
            pass
