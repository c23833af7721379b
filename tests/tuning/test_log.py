"""The log of records: what is written is read, and no kill, torn tail or full disk loses more than one record."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saevit_tvm.support.errors import TuningError
from saevit_tvm.tuning.log import Log, decode, encode

payloads = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
records_of_anything = st.dictionaries(st.text(), payloads, max_size=5)


def read(path: Path) -> list[dict]:
    return list(Log(path).new_records())


@pytest.mark.slow
@given(st.lists(records_of_anything, max_size=5))
@settings(max_examples=150, deadline=None)
def test_what_is_appended_is_read(records: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        log = Log(path)
        for record in records:
            log.append([record])
        assert read(path) == records
        assert list(log.new_records()) == records
        assert list(log.new_records()) == []


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_bytes_of_another_origin_are_no_record(line: bytes) -> None:
    assert decode(line) is None


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    line = encode({"trace": [["GetSBlock", [], ["C"]]], "run_secs": [1.5e-3]})
    for position in range(len(line)):
        damaged = bytearray(line)
        damaged[position] ^= 1
        assert decode(bytes(damaged)) is None


def test_a_torn_tail_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept, torn = [{"n": 1}, {"n": 2}], {"n": 3, "text": "x" * 40}
    whole = b"".join(encode(record) for record in kept)
    for length in range(len(encode(torn))):
        path.write_bytes(whole + encode(torn)[:length])
        assert read(path) == kept
        assert path.stat().st_size == len(whole) + length, "reading must not change the file"
        log = Log(path)
        log.repair()
        assert log.damage.torn_bytes == length
        assert path.read_bytes() == whole
        log.append([{"n": 4}])
        assert read(path) == [*kept, {"n": 4}]


def test_appending_after_a_torn_tail_needs_no_repair_first(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(encode({"n": 1}) + b"\0" * 200_000)  # as a power cut may leave it
    Log(path).append([{"n": 2}])
    assert read(path) == [{"n": 1}, {"n": 2}]


def test_a_broken_line_in_the_middle_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [encode({"n": number}) for number in range(5)]
    lines[1] = lines[1].replace(b'"n":1', b'"n":7')
    lines[3] = b"not a record\n"
    path.write_bytes(b"".join(lines))
    log = Log(path)
    assert [record["n"] for record in log.new_records()] == [0, 2, 4]
    assert log.damage.broken_lines == 2
    assert log.damage.torn_bytes == 0


APPEND_FOREVER = """
import sys
from pathlib import Path
from saevit_tvm.tuning.log import Log
log, writer = Log(Path(sys.argv[1])), sys.argv[2]
for number in range(10**9):
    log.append([{"writer": writer, "number": number, "filler": "x" * (number * 37 % 3000)}])
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


def start_writer(path: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPEND_FOREVER, str(path), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_soon(writer: subprocess.Popen[str]) -> int:
    """SIGKILL at a random moment; how many appends had returned."""
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(random.random() * 0.03)
    writer.send_signal(signal.SIGKILL)
    done = 1 + len(writer.stdout.read().split("\n")[:-1])
    writer.wait()
    return done


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_no_finished_append(tmp_path: Path) -> None:
    """At most one record more than were reported: the one whose append had not returned yet."""
    path = tmp_path / "log.jsonl"
    expected: dict[str, int] = {}
    for repetition in range(25):
        writer = start_writer(path, str(repetition))
        expected[str(repetition)] = kill_soon(writer)
        log = Log(path)
        log.repair()
        found: dict[str, list[int]] = {}
        for record in log.new_records():
            found.setdefault(record["writer"], []).append(record["number"])
        assert log.damage.broken_lines == 0
        for name, reported in expected.items():
            assert found[name] == list(range(len(found[name])))
            assert reported <= len(found[name]) <= reported + 1


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    writers = {name: start_writer(path, name) for name in ("a", "b")}
    time.sleep(1.0)
    reported = {name: kill_soon(writer) for name, writer in writers.items()}
    log = Log(path)
    records = list(log.new_records())
    assert log.damage.broken_lines == 0
    for name in writers:
        numbers = [record["number"] for record in records if record["writer"] == name]
        assert numbers == list(range(len(numbers)))
        assert reported[name] <= len(numbers) <= reported[name] + 1


SLOW_DISK = """
import os, time
real = os.write
def in_two_parts(file, data):
    if len(data) < 40:  # not a record
        return real(file, data)
    done = real(file, data[: len(data) // 2])
    time.sleep(0.002)
    return done + real(file, data[done:])
os.write = in_two_parts
"""


def test_only_one_writer_writes_at_a_time(tmp_path: Path) -> None:
    """On a disk that takes a record in two parts, another's record must neither come between nor cut one off."""
    path = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", SLOW_DISK + APPEND_FOREVER.replace("10**9", "60"), str(path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in ("a", "b", "c")]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    log = Log(path)
    records = list(log.new_records())
    assert (log.damage.broken_lines, log.torn()) == (0, 0)
    for name in ("a", "b", "c"):
        assert [record["number"] for record in records if record["writer"] == name] == list(range(60))


SHARE = """
import sys, time
from pathlib import Path
from saevit_tvm.tuning.log import Log
with Log(Path(sys.argv[1])).shared():
    print("shared", flush=True)
    time.sleep(600)
"""


def test_nothing_is_rewritten_while_somebody_uses_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.append([{"number": 1}])
    with subprocess.Popen([sys.executable, "-c", SHARE, str(log.path)], stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None and user.stdout.readline() == "shared\n"
        with log.shared():
            pass  # as many as there are
        with pytest.raises(TuningError, match="in use"), log.alone():
            pass
        user.kill()
    with log.alone():
        log.rewrite(lambda lines: [line for line, _ in lines] * 2)
    assert read(log.path) == [{"number": 1}, {"number": 1}]


REWRITE_FOREVER = """
import sys
from pathlib import Path
from saevit_tvm.tuning.log import Log
log = Log(Path(sys.argv[1]))
print("begins", flush=True)
while True:
    log.rewrite(lambda lines: [line for line, _ in reversed(lines)])
"""


def test_sigkill_in_a_rewrite_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.append([{"number": number, "filler": "x" * 1000} for number in range(300)])
    for _ in range(10):
        command = [sys.executable, "-c", REWRITE_FOREVER, str(log.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random.random() * 0.05)
            writer.kill()
        numbers = [record["number"] for record in read(log.path)]
        assert numbers in (list(range(300)), list(reversed(range(300))))
        assert Log(log.path).torn() == 0


def test_who_appends_while_the_file_is_replaced_appends_to_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    writer = start_writer(path, "a")
    assert writer.stdout is not None
    writer.stdout.readline()
    for _ in range(20):
        Log(path).rewrite(lambda lines: [line for line, _ in lines])
    reported = 1 + kill_soon(writer)
    assert reported <= len(read(path)) <= reported + 1


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_loses_nothing(small_disk: Path) -> None:
    path = small_disk / "log.jsonl"
    log, written = Log(path), 0
    with pytest.raises(TuningError, match=r"No space left on device.*kept"):
        while True:
            log.append([{"number": written, "filler": "x" * 700}])
            written += 1
    assert written > 20
    reopened = Log(path)
    assert [record["number"] for record in reopened.new_records()] == list(range(written))
    assert reopened.damage.broken_lines == 0
    assert path.read_bytes().endswith(b"\n"), "the half-written record must be gone"
    os.truncate(path, 0)
    log.append([{"number": 0}])
    assert read(path) == [{"number": 0}]


def test_a_rewrite_on_a_full_disk_changes_nothing(small_disk: Path) -> None:
    log = Log(small_disk / "log.jsonl")
    log.append([{"filler": "x" * 20_000}])
    before = log.path.read_bytes()
    with pytest.raises(TuningError, match="No space left on device"):
        log.rewrite(lambda lines: [line for line, _ in lines] * 4)
    assert log.path.read_bytes() == before
    assert [path.name for path in small_disk.iterdir()] == ["log.jsonl"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="--store"):
        Log(tmp_path / "file" / "log.jsonl").append([{}])
