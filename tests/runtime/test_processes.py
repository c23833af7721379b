"""What an engine does to its process, and what forking, exiting and other users of TVM do to an engine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

PREAMBLE = """
import os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import saevit_tvm
path = sys.argv[1]
engine = saevit_tvm.load(path, threads=2)
shape = engine.inputs[0].shape
weights = np.load(sys.argv[2])

def right():
    x = np.random.standard_normal(shape).astype(np.float32)
    return np.allclose(engine(x), np.maximum(x, 0) @ weights, rtol=1e-4, atol=1e-2)

def workers():
    return sum(thread.name.startswith("saevit-tvm") for thread in threading.enumerate())

def forked(work):
    "What a child process says, or how it ended."
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(work()).encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 1000).decode()
    return said or os.waitpid(child, 0)
"""


def python(script: str, sample: Any, tmp_path: Any) -> str:
    """What the script prints in a process of its own, which must end well, in time, and without complaint.

    Newer Pythons warn of every fork in a process with threads; that is what is tried here.
    """
    weights = tmp_path / "weights.npy"
    np.save(weights, sample.weights)
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            PREAMBLE + textwrap.dedent(script),
            str(sample.path),
            str(weights),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


def test_loads_neither_torch_nor_the_compiler(sample: Any, tmp_path: Any) -> None:
    script = """
        assert right()
        heavy = {"torch", "tvm", "tvm_ffi", "onnx", "jsonschema", "click", "rich"}
        print(sorted(heavy & set(sys.modules)), "libtvm_compiler" in open("/proc/self/maps").read())
    """
    assert python(script, sample, tmp_path) == "[] False"


@pytest.mark.slow
def test_the_compiler_may_come_later(sample: Any, tmp_path: Any) -> None:
    """One copy of TVM's libraries serves the engine and the Python packages."""
    script = """
        assert right()
        import tvm
        x = tvm.runtime.tensor(np.ones(3, "float32"))
        maps = open("/proc/self/maps").read().split()
        print(len({path for path in maps if "libtvm_runtime.so" in path}), x.numpy().sum(), right())
        engine = saevit_tvm.load(path, threads=1)
        print(right(), workers())  # the calling thread's pool is TVM's own here
    """
    assert python(script, sample, tmp_path).splitlines() == ["1 3.0 True", "True 1"]


def test_what_takes_a_moment_wakes_no_thread(sample: Any, tmp_path: Any) -> None:
    script = """
        engine = saevit_tvm.load(path, threads=1)
        print(right(), forked(right), workers())
        with ThreadPoolExecutor(1) as other:
            print(other.submit(right).result(), workers(), right())
    """
    assert python(script, sample, tmp_path).splitlines() == ["True True 0", "True 1 True"]


def test_what_takes_longer_is_computed_by_a_worker(sample: Any, forged: Any, tmp_path: Any) -> None:
    """So that Ctrl-C need not wait for it."""
    work = {"multiply_adds": 10**10, "left_to_rules": 0, "kernels_left": {}}
    script = "engine = saevit_tvm.load(path, threads=1); print(right(), workers())"
    long = dataclasses.replace(sample, path=forged({"work": work}))
    assert python(script, long, tmp_path) == "True 1"


def test_an_interrupted_caller_computes_again(long_sample: Any, tmp_path: Any) -> None:
    script = """
        import signal
        def interrupted(*_):
            raise KeyboardInterrupt
        engine = saevit_tvm.load(path, threads=1)
        signal.signal(signal.SIGALRM, interrupted)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            engine(np.zeros(shape, np.float32))
        except KeyboardInterrupt:
            print(right(), forked(right), workers())
    """
    assert python(script, long_sample, tmp_path) == "True True 0"


def test_right_after_fork(sample: Any, tmp_path: Any) -> None:
    """TVM's threads do not survive a fork; a child that used them would wait for ever."""
    script = """
        assert right()
        print(forked(right), forked(lambda: forked(right)), right())
    """
    assert python(script, sample, tmp_path) == "True True True"


def test_child_exits_normally(sample: Any, tmp_path: Any) -> None:
    script = """
        import multiprocessing
        assert right()
        if os.fork() == 0:
            sys.exit(0 if right() else 1)
        assert os.wait()[1] == 0
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.starmap(right, [()] * 6), right())
    """
    assert python(script, sample, tmp_path) == f"{[True] * 6} True"


@pytest.mark.slow
def test_fork_in_the_middle_of_a_call(long_sample: Any, tmp_path: Any) -> None:
    """Then TVM's locks may be held by a thread that the child has not: it must refuse, not hang."""
    script = """
        x = np.zeros(shape, np.float32)
        caller = threading.Thread(target=lambda: [engine(x) for _ in range(3)])
        caller.start()
        time.sleep(0.05)
        def refused():
            try:
                return right()
            except saevit_tvm.support.errors.ArtifactError as error:
                return error
        import saevit_tvm.support.errors
        print(forked(refused))
        caller.join()
        print(forked(refused), right())
    """
    first, second = python(script, long_sample, tmp_path).splitlines()
    assert "was forked while its parent was computing" in first
    assert second == "True True"


def test_fork_after_an_interrupted_call(long_sample: Any, tmp_path: Any) -> None:
    """Who waited for the answer is gone, the thread that computes it is not."""
    script = """
        import signal
        from saevit_tvm.support.errors import ArtifactError
        def interrupted(*_):
            raise KeyboardInterrupt
        def refused():
            try:
                return right()
            except ArtifactError as error:
                return error
        signal.signal(signal.SIGALRM, interrupted)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            engine(np.zeros(shape, np.float32))
        except KeyboardInterrupt:
            print(forked(refused))
    """
    assert "was forked while its parent was computing" in python(script, long_sample, tmp_path)


def test_fork_in_the_middle_of_loading(sample: Any, tmp_path: Any) -> None:
    script = """
        from saevit_tvm.runtime import engine as module
        from saevit_tvm.support.errors import ArtifactError
        def loaded():
            try:
                return saevit_tvm.load(path).path
            except ArtifactError as error:
                return error
        with module._loading:  # as another thread holds it for as long as it loads
            print(forked(loaded))
    """
    assert "was forked while its parent was computing or loading" in python(script, sample, tmp_path)


@pytest.mark.slow
def test_exit_while_computing(long_sample: Any, tmp_path: Any) -> None:
    script = """
        x = np.zeros(shape, np.float32)
        for _ in range(3):
            threading.Thread(target=engine, args=(x,), daemon=True).start()
        time.sleep(0.05)
        print("bye")
    """
    assert python(script, long_sample, tmp_path) == "bye"


def test_file_overwritten_in_use(sample: Any, other_sample: Any, tmp_path: Any) -> None:
    """Written into, not renamed: the engine in memory runs on torn code, and the next load must say so."""
    script = f"""
        import shutil
        copy = {str(tmp_path / "copy.so")!r}
        shutil.copyfile(path, copy)
        in_use = saevit_tvm.load(copy)
        shutil.copyfile({str(other_sample.path)!r}, copy)
        try:
            saevit_tvm.load(copy)
        except saevit_tvm.support.errors.ArtifactError as error:
            print(error, flush=True)
        os._exit(0)
    """
    assert "was overwritten while an engine was using it" in python(script, sample, tmp_path)
