"""The street to an NVIDIA GPU, where it differs from that to an OpenCL device.

    kernels     the same declarations, tiled for the architecture's limits
    library     what lies between input and output is captured as a CUDA graph when it first runs; kernels go into the
                library as machine code for every architecture asked for and PTX of the newest, never as source

What was compiled is then read back: every kernel for every architecture, within its limits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

from saevit_tvm.compiler import library, opencl, pipeline
from saevit_tvm.compiler.device_code import compile_kernels, source_of
from saevit_tvm.targets.cuda import CUDATarget

if TYPE_CHECKING:
    from saevit_tvm.models.sources import ModelSource
    from saevit_tvm.targets import Target

CAPTURE = "relax.backend.use_cuda_graph"
_LEAVE_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"


@contextlib.contextmanager
def generating_source() -> Iterator[None]:
    """The setting in which kernels become CUDA C++, for a library and for a measurement alike.

    Where NVIDIA's driver is installed, TVM would compile them at once, with a package that nobody needs here.
    """
    before = os.environ.get(_LEAVE_SOURCE)
    os.environ[_LEAVE_SOURCE] = "1"
    try:
        with tvm.transform.PassContext(opt_level=3):
            yield
    finally:
        os.environ.pop(_LEAVE_SOURCE)
        if before is not None:
            os.environ[_LEAVE_SOURCE] = before


def compile_for_cuda(
    source: ModelSource, target: Target, records: Any | None, dump_ir: Path | None, dtype: str
) -> pipeline.Compiled:
    """From a PyTorch model to an executable and its compiled kernels."""
    assert isinstance(target, CUDATarget)
    dump, tvm_target = pipeline._Dump(dump_ir), tvm.target.Target(target.tvm)
    made = opencl.scheduled(source, target, records, dump, dtype)
    with library.told_plainly(f"CUDA kernels of {source.name}"):
        executable = _built(made.module, tvm_target, dump)
    kernels = source_of(executable.mod)
    dump.text("kernels.cu", kernels)
    return made.compiled(executable, target, records, compile_kernels(kernels, target.architectures))


def beside_this_cpu(compiled: pipeline.Compiled) -> pipeline.Compiled:
    """The same kernels, called alike, from a host part for this machine."""
    assert isinstance(compiled.target, CUDATarget)
    target = compiled.target.beside_this_cpu()
    executable = _built(compiled.module, tvm.target.Target(target.tvm), pipeline._Dump(None))
    return replace(compiled, executable=executable, target=target)


def _built(scheduled: tvm.IRModule, target: tvm.target.Target, dump: pipeline._Dump) -> relax.VMExecutable:
    with target, tvm.transform.PassContext(opt_level=3, config={CAPTURE: True}):
        mod = dump("library", tvm.transform.Sequential(pipeline.virtual_machine(capture=True))(scheduled))
    with generating_source():
        return relax.build(mod, target, relax_pipeline=None)
