"""NVIDIA GPUs: kernels go into the library as machine code for every architecture asked for and PTX of the newest.

What lies between input and output is captured as a CUDA graph when it first runs. What was compiled is read back:
every kernel for every architecture, within its limits; never source.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import tvm
from tvm import relax
from tvm.ir.transform import Pass

from saevit_tvm.backends import nvrtc
from saevit_tvm.backends.base import Description, StandIn
from saevit_tvm.backends.device_code import DeviceCode, check_library, compile_kernels, packer, source_of
from saevit_tvm.backends.gpu import Gpu
from saevit_tvm.compiler import library, street
from saevit_tvm.compiler.street import Compiled, Dump
from saevit_tvm.emulators import cuda as emulated
from saevit_tvm.runtime import cuda
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.support.errors import TargetError
from saevit_tvm.targets import Target
from saevit_tvm.targets.cuda import CUDATarget

CAPTURE = "relax.backend.use_cuda_graph"
_LEAVE_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"


class Cuda(Gpu):
    device = "cuda"
    numbers = (2, 1)
    driver = " but NVIDIA's driver, 580 or later"
    graphs = True
    settings: ClassVar = {CAPTURE: True}

    def library(self) -> list[Pass]:
        return street.virtual_machine(capture=True)

    def executable(self, mod: tvm.IRModule, target: Target, what: str) -> relax.VMExecutable:
        with library.in_one_line(f"CUDA {what}"), generating_source():
            return relax.build(mod, tvm.target.Target(target.tvm), relax_pipeline=None)

    def device_code(self, executable: relax.VMExecutable, target: Target, dump: Dump) -> DeviceCode:
        assert isinstance(target, CUDATarget)
        source = source_of(executable.mod)
        dump.text("kernels.cu", source)
        return compile_kernels(source, target.architectures)

    def link(self, compiled: Compiled, path: Path) -> None:
        assert isinstance(compiled.code, DeviceCode)
        library.link_shared(compiled.executable, compiled.target, path, packer(compiled.code))
        check_library(path, compiled.code)

    def generating(self, module: tvm.IRModule, target: Description) -> AbstractContextManager[None]:
        return generating_source()

    def export(self, built: Any, target: Description, path: Path, link: Any) -> None:
        """As machine code, as an artifact has it."""
        code = compile_kernels(source_of(built), (target["arch"],), with_ptx=False)
        built.export_library(str(path), fcompile=link, fpack_imports=packer(code))
        check_library(path, code)

    def require_tunable(self, target: Target) -> None:
        cuda.require_architecture(target.name, target.tvm["arch"])

    def lacking(self) -> str | None:
        return nvrtc.missing()

    def available(self) -> tuple[bool, str]:
        there, reason = cuda.available()
        return there, reason if there else f"needs an NVIDIA GPU, and {reason}"

    def runs_here(self, target: Target) -> tuple[bool, str]:
        there, reason = super().runs_here(target)
        instead = "" if there else "; its code is read back, and where it can, this CPU runs its kernels"
        return there, reason + instead

    def activate(self) -> None:
        cuda.activate()

    def names(self) -> list[str]:
        return [device.name for device in cuda.devices()]

    def machine(self) -> str:
        gpu = cuda.devices()[0]
        return f"{gpu.name}, sm_{gpu.capability}"

    def proof(self) -> str:
        return "cuda"

    def stand_in(self, compiled: Compiled, folder: Path) -> StandIn:
        assert isinstance(compiled.code, DeviceCode)
        if lacking := emulated.missing():
            raise TargetError(lacking)
        gpu = emulated.environment(compiled.code.source, compiled.code.report["architectures"][0], folder)
        alike = compiled.target.arch == platform.machine()
        program = compiled if alike else self.beside_this_cpu(compiled)
        return StandIn(program, "a stand-in for NVIDIA's driver", environment=gpu)

    def has_kernels_of(self, artifact: Path, library: Path, stand_in: StandIn) -> bool:
        """By the source: its compiler makes other names each time."""
        assert isinstance(stand_in.compiled.code, DeviceCode)
        found = read_manifest(artifact)["device_code"].get("source")
        return bool(found == stand_in.compiled.code.report["source"])

    def runtime_libraries(self) -> dict[str, Path]:
        return nvrtc.cuda_runtime()

    def check_foreign(self, target: Target) -> None:
        raise TargetError(
            f"there is no RPC server for target '{target.name}' on this machine: install apache-tvm there, and "
            "start 'python -m tvm.exec.rpc_server'."
        )


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
