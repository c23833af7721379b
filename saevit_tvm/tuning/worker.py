"""A child process that builds or runs candidates, one job at a time, for `measure.py`.

It is expendable: a candidate may crash it or hang it, and it is then replaced. It outlives neither its parent nor
the connection to it, however the parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
REPEATS = 3
REPEAT_MS = 40


def build(module_json: str, target_json: str, library: str) -> list[tuple[str, list[int]]]:
    """Compile a scheduled kernel into a shared library; gives the dtype and shape of its arguments.

    MetaSchedule's own build function would import `tvm.s_tir.tensor_intrin` first: half a minute of parsing
    intrinsics that kernels of a CPU do not use.
    """
    import tvm
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    from saevit_tvm.compiler.library import generating_code

    target = json.loads(target_json)
    module = _with_loops(tvm.ir.load_json(module_json), target)
    module = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module)
    with generating_code():
        tvm.tirx.build(module, target=tvm.target.Target(target)).export_library(library)
    arguments = [argument.as_json() for argument in ArgInfo.from_entry_func(module, remove_preproc=False)]
    return [(str(dtype), [int(extent) for extent in shape]) for _, dtype, shape in arguments]


def _with_loops(module: Any, target: dict[str, Any]) -> Any:
    """The module itself, or the loops that its generator makes of it if it is a declaration."""
    if "saevit.region" not in module["main"].attrs:
        return module
    from schedules.cpu.isa import isa_of
    from schedules.regions import expanded

    return expanded(module, isa_of(target), int(target.get("num-cores", 1)))


def run(library: str, arguments: list[tuple[str, list[int]]], hopeless: float) -> list[float]:
    """Time a kernel in seconds a call. One that takes longer than `hopeless` is timed only once."""
    import tvm

    module = tvm.runtime.load_module(library)
    Path(library).unlink()
    fill = tvm.get_global_func("tvm.contrib.random.random_fill_for_measure")
    device = tvm.runtime.device("cpu", 0)
    tensors = []
    for dtype, shape in arguments:
        tensors.append(tvm.runtime.empty(shape, dtype, device))
        fill(tensors[-1])
    once = module.time_evaluator("main", device, number=1, repeat=1)(*tensors).results
    if once[0] > hopeless:
        return list(once)
    timer = module.time_evaluator("main", device, number=1, repeat=REPEATS, min_repeat_ms=REPEAT_MS)
    return list(timer(*tensors).results)


JOBS: dict[str, Callable[..., Any]] = {"build": build, "run": run}


def serve(connection: Connection) -> None:
    """Do jobs until the parent hangs up; answer each with its result or with the error's text."""
    import tvm  # noqa: F401  (pay for it before the first job, so that no time-out counts it)

    connection.send(None)
    while True:
        job, arguments = connection.recv()
        try:
            answer = (True, JOBS[job](*arguments))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        connection.send(answer)


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the parent is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the request was made
        os._exit(0)


def main() -> None:
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    die_with(parent)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(connection)


if __name__ == "__main__":
    main()
