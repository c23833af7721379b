"""One model compiled in stages, each with one idea more than the one before, and executables timed in turns.

The generated kernels of regions work channels last and on the microkernel, so these three cannot be had in any
order: first the layout with TVM's own loops, then the microkernel for single convolutions, then whole blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import tvm

from relay_patterns import find_blocks, find_primitives
from saevit_tvm import backends
from saevit_tvm.backends import cpu
from saevit_tvm.compiler import kernels, street
from saevit_tvm.compiler.importers import import_model
from saevit_tvm.compiler.passes import DeclareKernels
from saevit_tvm.compiler.passes.declare_kernels import Find
from saevit_tvm.runtime.engine import configure_thread_pool
from saevit_tvm.tuning.records import open_records
from schedules.machines.cpus import isa_of, threads_of

Name = TypeVar("Name")


def plain(source: Any, target: Any) -> Any:
    """What `tvm.compile` does by itself."""
    return tvm.compile(import_model(source), tvm.target.Target(target.tvm))


def compiled(
    source: Any,
    target: Any,
    *,
    finders: Sequence[Find] = (),
    database: Any | None = None,
) -> Any:
    """The street of `saevit_tvm.compiler.street`, with only these kernels and only these records."""
    tvm_target = tvm.target.Target(target.tvm)
    mod = street.run(import_model(source), street.simplify(), tvm_target)
    accepts = cpu.Cpu().accepts(street.Recipe(source, target))
    mod = street.run(mod, [DeclareKernels(find, accepts) for find in finders], tvm_target)
    schedules = cpu.schedules(database, isa_of(target.tvm), threads_of(target.tvm))
    for passes in (cpu.layout(), cpu.kernels(), schedules, street.virtual_machine()):
        mod = street.run(mod, passes, tvm_target)
    return kernels.executable(mod, target)


def _shipped(source: Any, target: Any) -> Any:
    return backends.compile_model(source, target, records=open_records(None, target)).executable


STAGES: dict[str, Callable[[Any, Any], Any]] = {
    "plain TVM": plain,
    "+ BatchNorm folded, channels last, loops vectorised by rule": compiled,
    "+ each convolution, and what follows it, on the generated microkernel": lambda s, t: compiled(
        s, t, finders=[find_primitives]
    ),
    "+ SAA, CIFFN, DWSConv as one kernel each": lambda s, t: compiled(s, t, finders=[find_blocks, find_primitives]),
    "+ tuned tilings, as built by default": _shipped,
}


def in_turns(
    executables: Mapping[Name, Any], example: np.ndarray, threads: int, seconds: float
) -> dict[Name, tuple[list[float], np.ndarray]]:
    """Milliseconds of each, in this process and in turns, and what it answers (its first output)."""
    configure_thread_pool(threads)  # TVM's own setting binds both threads to one core of a virtual machine
    machines = {name: tvm.relax.VirtualMachine(made, tvm.cpu()) for name, made in executables.items()}
    x = tvm.runtime.tensor(example)
    times: dict[Name, list[float]] = {name: [] for name in machines}
    end = time.monotonic() + seconds * len(machines)
    while not all(times.values()) or time.monotonic() < end:
        for name, machine in machines.items():
            machine["main"](x)
            start = time.perf_counter()
            machine["main"](x)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: (times[name], _first(machine["main"](x))) for name, machine in machines.items()}


def _first(answer: Any) -> np.ndarray:
    return (answer if hasattr(answer, "numpy") else answer[0]).numpy()
