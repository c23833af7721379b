"""A child process that builds or runs candidates, one job at a time, for `pool.py`.

It is expendable: a candidate may crash it or hang it, and it is then replaced. It outlives neither its parent nor
the connection to it, however the parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from saevit_tvm import backends
from saevit_tvm.measure.offline import LAUNCH_SECONDS, Graph
from saevit_tvm.runtime import cuda
from saevit_tvm.support.child import collect_seldom, die_with_parent, without_torch

REPEATS = 3
REPEAT_MS = 40
FILL = "tvm.contrib.random.random_fill_for_measure"
KERNEL_CRASHED = "the kernel crashed"  # what rpc_server.c says


Argument = tuple[str, list[int]]


def build(module_json: str, target_json: str, library: str, linker: list[str]) -> list[Argument]:
    """Compile a scheduled kernel into a shared library; gives the dtype and shape of its arguments.

    MetaSchedule's own build function would import `tvm.s_tir.tensor_intrin` first: half a minute of parsing
    intrinsics that kernels of a CPU do not use.
    """
    import tvm
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock
    from tvm.support import cc

    from schedules.kernels import declared

    target = json.loads(target_json)
    backend = backends.get(target["kind"])
    module = tvm.ir.load_json(module_json)
    if declared(module["main"]) is not None:
        module = backend.with_loops(module, target)
    module = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module)
    link = cc.cross_compiler(linker[0], options=linker[1:])
    with backend.generating(module, target):
        built = tvm.tirx.build(module, target=tvm.target.Target(target))
    backend.export(built, target, Path(library), link)
    arguments = [argument.as_json() for argument in ArgInfo.from_entry_func(module, remove_preproc=False)]
    return [(str(dtype), [int(extent) for extent in shape]) for _, dtype, shape in arguments]


def run(library: str, arguments: list[Argument], kind: str, hopeless: float) -> list[float]:
    """Time a kernel in seconds a call. One that takes longer than `hopeless` is timed only once."""
    import tvm

    backend = backends.get(kind)
    backend.activate()
    module = tvm.runtime.load_module(library)
    Path(library).unlink()
    device = tvm.runtime.device(backend.device, 0)
    tensors = random_tensors(arguments, device, tvm.get_global_func(FILL))
    return (replayed if backend.graphs else timed)(module, device, tensors, hopeless)


def random_tensors(arguments: list[Argument], device: Any, fill: Callable[[Any], Any]) -> list[Any]:
    """What a kernel is timed on, made where it will run."""
    import tvm

    tensors = [tvm.runtime.empty(shape, dtype, device) for dtype, shape in arguments]
    for tensor in tensors:
        fill(tensor)
    return tensors


def timed(module: Any, device: Any, tensors: list[Any], hopeless: float) -> list[float]:
    """Seconds a call, here or on another device; one look is enough at a kernel that is hopelessly slow."""
    once = module.time_evaluator("main", device, number=1, repeat=1)(*tensors).results
    if once[0] > hopeless:
        return list(once)
    timer = module.time_evaluator("main", device, number=1, repeat=REPEATS, min_repeat_ms=REPEAT_MS)
    return list(timer(*tensors).results)


def replayed(module: Any, device: Any, tensors: list[Any], hopeless: float) -> list[float]:
    """The same by replays of a CUDA graph, as an artifact launches kernels."""
    (once,) = module.time_evaluator("main", device, number=1, repeat=1)(*tensors).results
    if once > hopeless + LAUNCH_SECONDS:
        return [once]
    main = module["main"]
    return _graph().seconds(lambda: main(*tensors), once, REPEATS, REPEAT_MS)


@cache
def _graph() -> Graph:
    """One for all candidates: it has a stream and events of its own, which nobody gives back."""
    return Graph(*cuda.libraries())


_session: Any = None  # with the device that `reach` has reached, until `run_remotely` is done with it


def reach(host: str, port: int, match_key: str, library: str, seconds: float) -> bool:
    """Open a session with a device, which ends it after so many seconds, and bring it a library."""
    from tvm import rpc

    global _session
    _session = rpc.connect(host, port, match_key, session_timeout=seconds)
    _session.upload(library)
    return True


def run_remotely(library: str, arguments: list[Argument], kind: str, hopeless: float) -> list[float]:
    """Time a kernel on the device. What the device answers is the kernel's doing; no answer ends this process."""
    global _session
    session, _session = _session, None
    try:
        module = session.load_module(Path(library).name)
        device = session.device(backends.get(kind).device, 0)
        tensors = random_tensors(arguments, device, session.get_function(FILL))
        return timed(module, device, tensors, hopeless)
    except Exception as error:
        if not (_is_answer(error) or _is_there(session)):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # nothing of the session is of use any more
        raise
    finally:
        with contextlib.suppress(Exception):
            session.get_function("CloseRPCConnection")()


def _is_answer(error: Exception) -> bool:
    """Whether a server had the time to say what became of the kernel, before it ended the session."""
    return "RPCSessionTimeoutError" in str(error) or KERNEL_CRASHED in str(error)


def _is_there(session: Any) -> bool:
    try:
        session.get_function(FILL)
    except Exception:
        return False
    return True


JOBS: dict[str, Callable[..., Any]] = {"build": build, "run": run, "reach": reach, "run_remotely": run_remotely}


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


def main() -> None:
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    die_with_parent(parent)
    collect_seldom()
    without_torch()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        serve(connection)


if __name__ == "__main__":
    main()
