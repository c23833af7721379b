"""Foreign programs on this machine: user-mode qemu, TVM's runtime for their architecture, and a plugin that counts.

`run` runs an artifact; `command` starts any program. What is downloaded or compiled for that is kept in the cache
folder ($SAEVIT_TVM_CACHE, or ~/.cache/saevit-tvm), each piece complete or not there at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.runtime import elf
from saevit_tvm.runtime.artifact import check_versions, installed_versions, read_manifest
from saevit_tvm.runtime.manifest import at_batch, batches, entry
from saevit_tvm.runtime.tensors import Inputs, pictures, specs_of
from saevit_tvm.support import process, toolchain
from saevit_tvm.support.cache import cache_folder, made_once
from saevit_tvm.support.errors import ArtifactError, TargetError
from schedules.dtypes import dlpack

RUNTIME = ("libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so")
# The foreign architectures for which PyPI has TVM, and the minor versions of glibc that its wheels may ask for.
_WHEELS, _GLIBC = ("aarch64",), range(17, 41)
# The classes of the counting plugin, each instruction in one.
CLASSES = ("fma", "vector", "scalar", "load", "store", "branch", "sve")
_REFUSED = 3

Say = Callable[[str], None]


# What is there ------------------------------------------------------


def find(arch: str) -> str | None:
    """The path of qemu for programs of this architecture."""
    return shutil.which(f"qemu-{arch}") or shutil.which(f"qemu-{arch}-static")


def missing(arch: str) -> str | None:
    """What must be installed before artifacts for this architecture can be run here, or None."""
    if arch not in _WHEELS:
        return f"PyPI has no runtime of TVM for {arch}"
    if find(arch) is None:
        return "qemu is not there (Debian: apt install qemu-user)"
    if toolchain.sysroot(arch) is None:
        return f"the C and C++ libraries for {arch} are not there (Debian: apt install libstdc++6-arm64-cross)"
    try:
        toolchain.linker(toolchain.Linux(arch))
    except TargetError:
        return f"there is no C compiler for {arch} (Debian: apt install gcc-{arch}-linux-gnu; or pip install ziglang)"
    return None


@cache
def models(arch: str) -> tuple[str, ...]:
    """The CPU models that the installed qemu knows."""
    qemu = find(arch)
    listed = process.run([str(qemu), "-cpu", "help"]).stdout
    return tuple(line.strip() for line in listed.splitlines() if re.fullmatch(r"\s*[\w.-]+", line))


# Running ------------------------------------------------------------


def command(
    arch: str,
    cpu: str | None,
    argv: Sequence[str | Path],
    *,
    libraries: Path | None = None,
    count: Path | None = None,
) -> list[str]:
    """What to start to run a program of another architecture.

    `cpu` is one of qemu's models, `libraries` a folder for the program's LD_LIBRARY_PATH, and `count` a file into
    which the counting plugin writes its JSON when the program ends.
    """
    qemu, root = find(arch), toolchain.sysroot(arch)
    if qemu is None:
        raise TargetError(f"programs for {arch} need an emulator: install one (Debian: apt install qemu-user).")
    if cpu is not None and cpu not in models(arch):
        raise TargetError(f"{qemu} has no CPU model '{cpu}': its models are {', '.join(models(arch))}.")
    line = [qemu] + (["-cpu", cpu] if cpu else []) + (["-L", str(root)] if root else [])
    if libraries is not None:
        line += ["-E", f"LD_LIBRARY_PATH={libraries}"]
    if count is not None:
        line += ["-plugin", f"{counter()},out={count}"]
    return [*line, *map(str, argv)]


def run(
    artifact: Path,
    inputs: Sequence[Inputs],
    scratch: Path,
    *,
    cpu: str | None = None,
    times: int = 1,
    threads: int = 2,
    count: Path | None = None,
) -> list[list[np.ndarray]]:
    """The outputs for each input, computed `times` times by an artifact under emulation.

    Inputs of as many pictures that follow each other have one run of the emulator.
    """
    manifest = read_manifest(artifact)
    check_versions(manifest, artifact)
    answers = []
    for batch, alike in itertools.groupby(inputs, lambda each: pictures(each[0].shape)):
        answers += _run(artifact, at_batch(manifest, batch), list(alike), scratch, cpu, times, threads, count)
    return answers


def _run(
    artifact: Path,
    manifest: dict[str, Any],
    inputs: Sequence[Inputs],
    scratch: Path,
    cpu: str | None,
    times: int,
    threads: int,
    count: Path | None,
) -> list[list[np.ndarray]]:
    target, specs = manifest["target"], specs_of(manifest["inputs"])
    arch, cpu = target["arch"], cpu or target.get("emulator")
    libraries = foreign_runtime(arch)
    asked, answered = scratch / "inputs.raw", scratch / "outputs.raw"
    asked.write_bytes(b"".join(array.tobytes() for each in inputs for array in each))
    features = ",".join(target["features"]) or "-"
    name = entry(pictures(specs[0].shape), batches(manifest)[-1])
    program: list[str | Path] = [host(arch), artifact.absolute(), features, asked, answered, str(times), name]
    given = [":".join(map(str, [*dlpack(spec.dtype), *spec.shape])) for spec in specs]
    done = process.run_apart(
        command(arch, cpu, [*program, *given], libraries=libraries, count=count),
        env={"TVM_NUM_THREADS": str(threads), "TVM_THREAD_POOL_SPIN_COUNT": "2000", "TVM_BIND_THREADS": "0"},
    )
    _judge(done, artifact, cpu)
    return list(_outputs(answered.read_bytes(), manifest["outputs"], len(inputs), artifact))


def _judge(done: subprocess.CompletedProcess[str], artifact: Path, cpu: str | None) -> None:
    words = done.stderr.strip().splitlines()
    if done.returncode == _REFUSED:
        raise ArtifactError(f"'{artifact.name}' cannot be run on qemu's {cpu} model: {words[-1].rstrip('.')}.")
    if done.returncode < 0 or done.returncode > 128:
        name = signal.Signals(-done.returncode if done.returncode < 0 else done.returncode - 128).name
        hint = "it uses instructions that this model lacks" if name == "SIGILL" else "please report the model"
        raise ArtifactError(f"'{artifact.name}' crashes on qemu's {cpu} model ({name}): {hint}.")
    if done.returncode:
        raise ArtifactError(f"qemu failed to run '{artifact.name}': {words[-1] if words else 'no reason was given'}.")


def _outputs(
    raw: bytes, described: Sequence[Mapping[str, Any]], count: int, artifact: Path
) -> Iterator[list[np.ndarray]]:
    sizes = [int(np.prod(each["shape"])) * np.dtype(each["dtype"]).itemsize for each in described]
    if len(raw) != count * sum(sizes):
        raise ArtifactError(f"'{artifact.name}' answers with other outputs than its manifest says: build it again.")
    position = 0
    for _ in range(count):
        outputs = []
        for each, size in zip(described, sizes, strict=True):
            flat = np.frombuffer(raw[position : position + size], each["dtype"])
            outputs.append(flat.reshape(each["shape"]))
            position += size
        yield outputs


# What is made or fetched, once ----------------------------------------


def foreign_runtime(arch: str, say: Say = lambda _line: None) -> Path:
    """A folder with TVM's runtime libraries for another architecture, of exactly the installed versions."""
    if arch not in _WHEELS:
        raise TargetError(f"artifacts for {arch} cannot be run here: PyPI has no runtime of TVM for {arch}.")
    versions = installed_versions()
    with made_once(_runtime_name(arch)) as (place, fresh):
        if fresh is not None:
            say(f"downloading TVM's runtime for {arch} from PyPI (once, about 100 MB)")
            with tempfile.TemporaryDirectory(dir=fresh.parent, prefix=".wheels-") as wheels:
                _download(arch, versions, Path(wheels))
                _unpack(Path(wheels), fresh)
            for library in RUNTIME:
                if elf.read(fresh / library)[1:] != ("shared library", arch):
                    raise TargetError(f"the downloaded {library} is {elf.read(fresh / library)}, not for {arch}.")
    return place


def has_runtime(arch: str) -> bool:
    """Whether that folder is there already."""
    return (cache_folder() / _runtime_name(arch)).exists()


def _runtime_name(arch: str) -> str:
    versions = installed_versions()
    return f"runtimes/{arch}-tvm{versions['tvm']}-ffi{versions['tvm_ffi']}"


def _download(arch: str, versions: Mapping[str, str], folder: Path) -> None:
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    line += ["--dest", str(folder), "--python-version", f"{sys.version_info.major}.{sys.version_info.minor}"]
    for minor in _GLIBC:
        line += ["--platform", f"manylinux_2_{minor}_{arch}"]
    line += [f"apache-tvm=={versions['tvm']}", f"apache-tvm-ffi=={versions['tvm_ffi']}"]
    done = process.run(line)
    if done.returncode:
        errors = [text for text in done.stderr.splitlines() if text.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else "pip gave no reason"
        raise TargetError(
            f"TVM's runtime for {arch} cannot be downloaded: {reason.rstrip('.')}; "
            f"connect once, or copy the folder '{cache_folder() / 'runtimes'}' from a machine that has it."
        )


def _unpack(wheels: Path, folder: Path) -> None:
    """The runtime's libraries, out of the two wheels."""
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if Path(member).name in RUNTIME:
                    (folder / Path(member).name).write_bytes(archive.read(member))
    lacking = [name for name in RUNTIME if not (folder / name).is_file()]
    if lacking:
        raise TargetError(f"TVM's wheels hold no {', '.join(lacking)}: install the pinned version of apache-tvm.")


def compiler(arch: str) -> tuple[str, ...]:
    """The C compiler for programs that run under the emulator."""
    return toolchain.linker(toolchain.Linux(arch)).cc_argv


def host(arch: str) -> Path:
    """The program that loads an artifact and runs it, compiled for an architecture."""
    return _host("host", arch)


def kernel_host(arch: str) -> Path:
    """The program that calls one kernel, compiled for an architecture."""
    return _host("kernel", arch)


def _host(name: str, arch: str) -> Path:
    spec = importlib.util.find_spec("tvm_ffi")
    assert spec is not None and spec.submodule_search_locations
    include = Path(spec.submodule_search_locations[0]) / "include"
    options = ["-std=gnu11", "-O1", "-rdynamic", f"-I{include}", "-ldl"]
    return _compiled(name, arch, compiler(arch), options, installed_versions()["tvm_ffi"])


def counter() -> Path:
    """The plugin of qemu that counts, compiled for this machine."""
    cc = shutil.which("cc")
    if cc is None:
        raise TargetError("counting instructions needs a C compiler: install one (Debian: apt install gcc).")
    return _compiled("count", os.uname().machine, (cc,), ["-O2", "-shared", "-fPIC"], "")


def _compiled(name: str, arch: str, cc: Sequence[str], options: Sequence[str], salt: str) -> Path:
    """What the compiler makes of a C file of ours, for as long as neither the file nor the command changes."""
    source = (resources.files("saevit_tvm.emulators") / "qemu_programs" / f"{name}.c").read_bytes()
    digest = hashlib.sha256(source + json.dumps([*cc, *options, salt]).encode()).hexdigest()[:16]
    with made_once(f"programs/{name}-{arch}-{digest}") as (place, fresh):
        if fresh is not None:
            (fresh / f"{name}.c").write_bytes(source)
            line = [*cc, str(fresh / f"{name}.c"), *options, "-o", str(fresh / name)]
            done = process.run(line)
            if done.returncode:
                raise TargetError(f"'{cc[0]}' cannot compile {name}.c for {arch}: {process.first_error(done.stderr)}")
            if elf.read(fresh / name).machine != arch:
                raise TargetError(f"'{cc[0]}' made {elf.read(fresh / name)}, not for {arch}: use another.")
    return place / name
