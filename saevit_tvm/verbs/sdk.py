"""sdk: a folder with all that a C or C++ project needs to run one artifact, proven before it is handed over.

The shared flavour is the artifact with TVM's runtime beside it. For the static flavour the model is compiled again
from what the manifest says, to the very kernels and the order in which the artifact calls them, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saevit_tvm import backends, targets
from saevit_tvm.proof import answers as proof
from saevit_tvm.proof import parity
from saevit_tvm.runtime import elf
from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.runtime.manifest import at_batch, batches, entry
from saevit_tvm.runtime.tensors import Inputs, specs_of
from saevit_tvm.support import process, toolchain, workspace
from saevit_tvm.support.errors import ArtifactError, CompileError, ParityError, TargetError, UsageError, unknown
from saevit_tvm.targets import Target
from saevit_tvm.verbs import made_before

if TYPE_CHECKING:
    from saevit_tvm.sdk.plan import Plan

Say = Callable[[str], None]

FORMAT = 1
FLAVOURS = {"static": ["static"], "shared": ["shared"], "both": ["static", "shared"]}
_RUNTIME = Path(__file__).parents[1] / "sdk" / "c"
_MARK = "sdk.json"
_NO_RUNTIME = (
    "this SDK needs TVM's runtime, and nobody publishes one for Android: build it with an NDK from TVM's sources, "
    "or build the model for a CPU (android-arm64) and give --flavour static."
)
_CFLAGS = ["-std=c11", "-O2", "-g0", "-fPIC", "-Wall", "-Wextra"]


@dataclass(frozen=True)
class SdkOptions:
    artifact: Path
    out: Path
    flavour: str = "static"
    weights: str | None = None
    store: Path | None = None
    reuse: bool = False  # take what was made before from the cache, if nothing has changed that it depends on


@dataclass
class _Work:
    """What every step needs to know, and what it found out."""

    options: SdkOptions
    flavours: list[str]
    manifest: dict[str, Any]
    target: Target
    compiler: toolchain.Toolchain
    folder: Path  # where the SDK grows
    scratch: Path
    say: Say
    warnings: list[str] = field(default_factory=list)


def sdk(options: SdkOptions, say: Say) -> dict[str, Any]:
    """Make the SDK and put it in place; a summary of it."""
    if options.flavour not in FLAVOURS:
        raise unknown("flavour", options.flavour, FLAVOURS)
    out = options.out.resolve()
    _check_free(out)
    manifest = read_manifest(options.artifact)
    backend = backends.described(manifest)
    backend.check_sdk(manifest["target"]["tvm"]["kind"])
    target, possible = targets.described(manifest["target"]), set(backend.flavours)
    if target.android and ("static" not in possible or options.flavour != "static"):
        raise TargetError(_NO_RUNTIME)
    if not possible.issuperset(FLAVOURS[options.flavour]):
        raise UsageError(
            f"the artifact is for an OpenCL device (target {target.name}), whose kernels need TVM's runtime: "
            "give --flavour shared."
        )
    compiler = toolchain.programs(target)
    with workspace.staging(out.parent) as staged, workspace.scratch() as scratch:
        workspace.reserve(staged, 3 * manifest["size"])
        folder = staged / "sdk"
        work = _Work(options, FLAVOURS[options.flavour], manifest, target, compiler, folder, scratch, say)
        key = made_before.sdk_key(options.artifact, _digest(options.artifact), vars(options), target, compiler)
        reused = options.reuse and made_before.find_folder(key, folder)
        if not reused:
            _make(work)
        summary = json.loads((folder / _MARK).read_text())
        unproven = [each for each in summary["verification"].values() if not each["passed"]]
        # As far as it can be here: what was in the way of a proof may be gone the next time.
        if options.reuse and not reused and not work.warnings and not (unproven and backends.how_to_run(target)):
            made_before.keep_folder(key, folder)
        _place(folder, out, staged)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return {"sdk": str(options.out), **summary, "files": files, "warnings": work.warnings, "reused": reused}


def _make(work: _Work) -> None:
    """All of the folder; the summary of it is the last file."""
    _write_sources(work)
    _try_compiler(work)
    workspaces = _make_static(work) if "static" in work.flavours else {}
    if "shared" in work.flavours:
        _make_shared(work)
    summary = {
        "format": FORMAT,
        "artifact": work.options.artifact.name,
        "artifact_digest": f"sha256:{_digest(work.options.artifact).hex()}",
        "model": work.manifest["model"],
        "target": work.target.name,
        "flavours": work.flavours,
        "versions": work.manifest["versions"],
        "workspace": workspaces,
        "verification": {flavour: _prove(work, flavour) for flavour in work.flavours},
    }
    (work.folder / _MARK).write_text(json.dumps(summary, indent=2) + "\n")


# Before the work ------------------------------------------------------


def _check_free(out: Path) -> None:
    """Only what does not exist, is empty, or is an SDK may be replaced."""
    if out == Path.cwd():
        raise UsageError("--out is the folder that you are in: give another.")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"'{out}' is not a directory: give --out a folder.")
    if any(out.iterdir()) and not (out / _MARK).is_file():
        raise UsageError(f"'{out}' is not empty and holds no SDK: give --out a new folder.")


# Sources ----------------------------------------------------------------


def _write_sources(work: _Work) -> None:
    from saevit_tvm.sdk import c_source

    folder = work.folder
    folder.mkdir()
    (folder / "lib").mkdir()
    for part in ("include", "example", "cmake"):
        shutil.copytree(_RUNTIME / part, folder / part)
    (folder / "src").mkdir()
    for path in sorted((_RUNTIME / "src").glob("*.[ch]")):
        shutil.copyfile(path, folder / "src" / path.name)
    for flavour in work.flavours:
        shutil.copytree(_RUNTIME / "src" / flavour, folder / "src" / flavour)
    needs_opencl = bool(backends.get(work.target.kind).board_files)
    described = c_source.describe(work.manifest, _digest(work.options.artifact), needs_opencl)
    (folder / "src" / "model.c").write_text(described)
    if not work.target.android:  # pkg-config names objects, and there these are still to be compiled
        (folder / "pkgconfig").mkdir()
        for flavour in work.flavours:
            _fill(work, f"pkgconfig/saevit-{flavour}.pc")
    for name in ("cmake/saevit-config-version.cmake", "Makefile", "README.md"):
        _fill(work, name)


def _fill(work: _Work, name: str) -> None:
    """A file with the model's particulars in the places that @SIGNS@ mark."""
    programs = [f"{program}-{flavour}" for flavour in work.flavours for program in ("classify", "tensor")]
    artifact = f"lib/{work.options.artifact.name}"
    usage = {
        "static": "    ./classify-static PICTURE.png       # one program, nothing beside it",
        "shared": f"    ./classify-shared PICTURE.png {artifact}",
    }
    text = (_RUNTIME / name).read_text()
    for sign, value in {
        "CC": _command_name(work.compiler.cc_argv),
        "PROGRAMS": " ".join(programs),
        "MODEL": work.manifest["model"],
        "TARGET": work.target.name,
        "VERSION": work.manifest["versions"]["saevit_tvm"],
        "USAGE": "\n".join(usage[flavour] for flavour in work.flavours),
        "ANDROID": (_RUNTIME / "android.md").read_text() if work.target.android else "",
    }.items():
        text = text.replace(f"@{sign}@", value)
    (work.folder / name).write_text(text)


def _command_name(argv: Sequence[str]) -> str:
    """The compiler as a person would type it."""
    name = Path(argv[0]).name
    return shlex.join([name if shutil.which(name) == argv[0] else argv[0], *argv[1:]])


def _digest(artifact: Path) -> bytes:
    """The seal of an artifact: the digest that its trailer states."""
    with artifact.open("rb") as file:
        file.seek(-48, os.SEEK_END)
        return file.read(32)


# Objects ------------------------------------------------------------------


def _make_static(work: _Work) -> dict[str, int]:
    """Compile the model again, to objects; the bytes of workspace that it needs."""
    from saevit_tvm.models.recreate import recreate
    from saevit_tvm.sdk import c_source
    from saevit_tvm.sdk.plan import plan_of, write_kernels
    from saevit_tvm.tuning.records import open_records

    manifest, known = work.manifest, batches(work.manifest)
    *smaller, source = [recreate(at_batch(manifest, batch), work.options.weights) for batch in known]
    work.say(f"compiling {source.name} for {work.target.name} once more, to objects")
    tuned = manifest["records_digest"] is not None
    records = open_records(work.options.store, work.target) if tuned else None
    compiled = backends.compile_model(source, work.target, records=records, dtype=manifest["dtype"], smaller=smaller)
    if compiled.records_digest != manifest["records_digest"]:
        work.warnings.append("the tuning records have changed since the artifact was built, so the kernels may differ")
    plan = plan_of(compiled, [entry(batch, known[-1]) for batch in known])
    (work.folder / "src" / "static" / "plan.c").write_text(c_source.plan_source(plan))
    kernels = write_kernels(compiled, work.scratch)
    _pack_weights(work, plan)
    _join(work, [*kernels, work.scratch / "weights.o"], work.folder / "lib" / "saevit_model.o")
    _compile_runtime(work, "static")
    scratch = {"scratch": plan.shared_scratch, "scratch_per_thread": plan.scratch_size}
    return {"arena": plan.arena_size, **scratch, "weights": len(plan.weights)}


def _pack_weights(work: _Work, plan: Plan) -> None:
    (work.scratch / "weights.bin").write_bytes(plan.weights or bytes(1))
    source = work.folder / "src" / "static" / "weights.S"
    _compile(work, ["-c", str(source), '-DWEIGHTS="weights.bin"', "-o", "weights.o"])
    source.unlink()  # nobody can use it without the weights as a file


def _make_shared(work: _Work) -> None:
    """The artifact and TVM's runtime side by side, and what loads them."""
    lib = work.folder / "lib"
    shutil.copyfile(work.options.artifact, lib / work.options.artifact.name)
    for path in _tvm_libraries(work):
        shutil.copyfile(path, lib / path.name)
    backends.get(work.target.kind).add_to(lib, work.target)
    _compile_runtime(work, "shared")


def _tvm_libraries(work: _Work) -> list[Path]:
    if work.target.arch == platform.machine():
        from saevit_tvm.runtime import abi

        return [abi.library_path("tvm_ffi"), abi.library_path("tvm", "tvm_runtime")]
    from saevit_tvm.emulators import qemu

    folder = qemu.foreign_runtime(work.target.arch, work.say)
    return [folder / "libtvm_ffi.so", folder / "libtvm_runtime.so"]


def _compile_runtime(work: _Work, flavour: str) -> None:
    source = work.folder / "src"
    objects = []
    for path in [*sorted(source.glob("*.c")), *sorted((source / flavour).glob("*.c"))]:
        made = work.scratch / f"{flavour}-{path.stem}.o"
        _compile(work, [*_CFLAGS, f"-I{work.folder / 'include'}", "-c", str(path), "-o", made.name])
        objects.append(made)
    _join(work, objects, _compiled_runtime(work, flavour))


def _compiled_runtime(work: _Work, flavour: str) -> Path:
    """The runtime as an object; one with another C library than the target's own is for the proof alone."""
    return (work.scratch if work.target.android else work.folder / "lib") / f"saevit_{flavour}.o"


def _try_compiler(work: _Work) -> None:
    """A compiler may know how to link for a target and have no C library for it: find out before minutes of work."""
    try:
        _compile(work, [*_CFLAGS, f"-I{work.folder / 'include'}", "-c", str(work.folder / "src" / "common.c")])
    except CompileError as error:
        reason = str(error).rpartition(": ")[2]
        raise TargetError(
            f"an SDK for target '{work.target.name}' needs its C library, and the compiler has none ({reason}): "
            "build for one of the others, such as arm64."
        ) from error


def _join(work: _Work, objects: Sequence[Path], made: Path) -> None:
    _compile(work, ["-r", "-nostdlib", *map(str, objects), "-o", str(made)])
    found = elf.read(made)
    if (found.machine, found.kind) != (work.target.arch, "object file"):
        raise CompileError(f"the compiler made {found} of {made.name}, where one for {work.target.arch} was asked for.")


def _compile(work: _Work, arguments: Sequence[str]) -> None:
    command = [*work.compiler.cc_argv, *arguments]
    done = process.run(command, cwd=work.scratch)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise CompileError(f"'{command[0]}' failed: {(lines or ['it gave no reason'])[0]}")


# Proof ----------------------------------------------------------------------


def _prove(work: _Work, flavour: str) -> dict[str, Any]:
    """Link a program against the SDK and compare what it answers with what PyTorch answered for the artifact."""
    program = work.scratch / f"tensor-{flavour}"
    objects = [_compiled_runtime(work, flavour)]
    objects += [work.folder / "lib" / "saevit_model.o"] if flavour == "static" else []
    _compile(
        work,
        [
            *_CFLAGS,
            f"-I{work.folder / 'include'}",
            str(work.folder / "example" / "tensor.c"),
            *map(str, objects),
            *("-lpthread", "-lm", "-ldl", "-o", program.name),
        ],
    )
    result: dict[str, Any] = {"passed": False, "max_abs_error": None, "max_rel_error": None, "proof": "none"}
    how, kept = _where_to_run(work.target, flavour), work.manifest["reference"]
    if how is None or kept is None:
        why = "there are no recorded answers" if kept is None else backends.why_not(work.target)
        work.say(f"{flavour}: linked, not run: {why}")
        return result
    work.say(f"{flavour}: verifying with a C program")
    inputs = parity.random_inputs(specs_of(work.manifest["inputs"]), kept["n"], kept["seed"])
    answers = [_answer(work, program, how, each) for each in inputs]
    deviation = parity.deviation([parity.sample(outputs) for outputs in answers], parity.recorded(work.manifest))
    fewer, expected = parity.with_smaller(inputs, answers, batches(work.manifest)[:-1])
    again = parity.deviation([_answer(work, program, how, each) for each in fewer], expected)
    tolerance = parity.allowed(work.manifest)
    if not (deviation.within(tolerance) and again.within(tolerance)):
        raise ParityError(
            f"the {flavour} flavour deviates from PyTorch by {deviation}, where {tolerance:g} is allowed, so no SDK "
            "was written: please report the model."
        )
    note = {"note": "a static program, with another C library than Android's"} if work.target.android else {}
    return {"passed": True, **deviation.entries, "proof": proof.kind(work.manifest["target"], how), **note}


def _where_to_run(target: Target, flavour: str) -> str | None:
    """Where a program for the target can be run; one without TVM's runtime also where TVM has none."""
    how = backends.how_to_run(target)
    if how is None and flavour == "static" and target.emulator and target.arch != platform.machine():
        from saevit_tvm.emulators import qemu

        how = "qemu" if qemu.find(target.arch) and toolchain.sysroot(target.arch) else None
    return how


def _answer(work: _Work, program: Path, how: str, inputs: Inputs) -> list[np.ndarray]:
    """The outputs for as many pictures as the inputs hold."""
    asked, answered = work.scratch / "inputs.raw", work.scratch / "outputs.raw"
    asked.write_bytes(b"".join(array.tobytes() for array in inputs))
    artifact = work.folder / "lib" / work.options.artifact.name
    command = [str(program), str(asked), str(answered), "2", "0", str(artifact)]
    if how == "qemu":
        from saevit_tvm.emulators import qemu

        command = qemu.command(work.target.arch, work.target.emulator, command)
    done = process.run(command)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ArtifactError(f"the program that was linked against the SDK failed: {words[-1]}")
    raw, position, outputs = answered.read_bytes(), 0, []
    manifest = at_batch(work.manifest, len(inputs[0])) if "batches" in work.manifest else work.manifest
    for spec in specs_of(manifest["outputs"]):
        outputs.append(np.frombuffer(raw, spec.dtype, math.prod(spec.shape), position).reshape(spec.shape))
        position += spec.nbytes
    return outputs


# Placing -----------------------------------------------------------------------


def _place(folder: Path, out: Path, staged: Path) -> None:
    """Put the finished folder where it belongs, in one step; an SDK that was there goes in another."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = staged / "old"
    if out.exists() and any(out.iterdir()):
        out.rename(old)
    try:
        workspace.place([(folder, out)])
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
