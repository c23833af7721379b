"""doctor: what this machine can do, and what is missing for the rest.

Whatever can crash (a broken TVM, its ffi, a compiler) is tried in a subprocess, so a crash is a finding.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from saevit_tvm.support import cpu, process
from saevit_tvm.support.child import import_path
from saevit_tvm.verbs import peers

TIMEOUT = 120
ROOM = 500_000_000  # bytes below which a disk is called nearly full

# Families and models of CPUs that have AVX-512 unless a hypervisor hides it.
AMD_ZEN4 = {(25, model) for low, high in ((0x10, 0x1F), (0x60, 0x7F), (0xA0, 0xAF)) for model in range(low, high + 1)}
INTEL_SERVERS = {(6, model) for model in (0x55, 0x6A, 0x6C, 0x8F, 0xCF, 0xAD, 0xAE)}


@dataclass(frozen=True)
class Check:
    """One finding. `needed` are those without which nothing can be built on and for this machine."""

    name: str
    ok: bool
    detail: str
    needed: bool = True


Found = list[Check]


def doctor(store: Path | None = None) -> dict[str, Any]:
    """Every check; `ready` when the main job (build and verify for this CPU) can be done."""
    groups: list[Callable[[], Found]] = [
        _python,
        _pins,
        _torch,
        _tvm,
        _tvm_ffi,
        _undeclared,
        _compiler,
        _cpu,
        _cores,
        lambda: _folder("temporary files", Path(tempfile.gettempdir())),
        lambda: _folder("tuning store", store or _default_store()),
        _targets,
        _emulation,
        _cuda,
        _peers,
    ]
    with ThreadPoolExecutor(2) as pool:  # they mostly wait for their subprocesses
        checks = [check for group in pool.map(lambda group: group(), groups) for check in group]
    ready = all(check.ok for check in checks if check.needed)
    return {"ready": ready, "checks": [asdict(check) for check in checks]}


# Trying things out --------------------------------------------------


def _try(code: str) -> tuple[bool, str]:
    """Run a piece of Python in a fresh process: whether it worked, and its last words."""
    try:
        command = [sys.executable, "-c", code]
        done = process.run_apart(command, timeout=TIMEOUT, env=os.environ | {"PYTHONPATH": import_path()})
    except subprocess.TimeoutExpired:
        return False, f"no answer within {TIMEOUT} s"
    if name := process.killed_by(done.returncode):
        return False, f"crashes with {name}"
    words = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, words[-1] if words else ""


def _works(name: str, code: str, fix: str = "install it again: pip install --force-reinstall saevit-tvm") -> Found:
    """One check that is a piece of Python."""
    ok, words = _try(code)
    return [Check(name, ok, words if ok else f"{words}; {fix}")]


# The installation ---------------------------------------------------


def _python() -> Found:
    fine = sys.version_info >= (3, 10)
    return [Check("python", fine, platform.python_version() + ("" if fine else "; 3.10 or later is needed"))]


def _pins() -> Found:
    """The versions of TVM, its ffi and PyTorch against what this package asks for."""
    checks = []
    try:
        wanted = [line for line in metadata.requires("saevit-tvm") or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        return [Check("installation", False, "saevit-tvm itself is not installed: pip install it")]
    for line in wanted:
        name, pins = re.match(r"([A-Za-z0-9._-]+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            checks.append(Check(name, False, f"not installed: pip install '{line}'"))
            continue
        fits = all(_fits(version, pin.strip()) for pin in pins.split(",") if pin.strip())
        if not fits or name in ("apache-tvm", "apache-tvm-ffi", "torch"):
            checks.append(
                Check(name, fits, version if fits else f"{version}, but {pins} is needed: pip install '{line}'")
            )
    return checks


def _fits(version: str, pin: str) -> bool:
    """Enough of PEP 440 for our own pins."""
    operator, bound = re.match(r"(==|>=|<=|<|>)\s*(.+)", pin).groups()  # type: ignore[union-attr]
    have, want = ([int(part) for part in re.findall(r"\d+", text.split("+")[0])] for text in (version, bound))
    return {"==": have == want, ">=": have >= want, "<=": have <= want, "<": have < want, ">": have > want}[operator]


def _torch() -> Found:
    return _works("torch imports", "import torch; torch.ones(2) + 1; print('works')")


def _undeclared() -> Found:
    code = "import psutil, cloudpickle, tornado, xgboost; print('all there')"
    return _works("what TVM needs and does not ask for", code)


def _tvm() -> Found:
    return _works(
        "TVM with LLVM",
        "import tvm; from tvm.target import codegen as c; print('LLVM', c.llvm_version_major(), 'for', "
        "', '.join(sorted({'x86_64', 'aarch64', 'riscv64', 'arm'} & set(map(str, c.llvm_get_targets())))))",
    )


def _tvm_ffi() -> Found:
    return _works(
        "tvm-ffi serialises IR",
        "import tvm; tvm.ir.load_json(tvm.ir.save_json(tvm.IRModule())); print('works')",
        "this tvm-ffi does not go with this TVM: pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'",
    )


def _compiler() -> Found:
    """Compile, link and load a trivial library."""
    name = "C compiler"
    compiler = shutil.which("cc")
    if compiler is None:
        return [Check(name, False, "'cc' is not on the PATH: install one (Debian: apt install gcc)")]
    with tempfile.TemporaryDirectory(prefix="saevit-tvm-") as folder:
        source, library = Path(folder, "a.c"), Path(folder, "a.so")
        source.write_text("int answer(void) { return 42; }\n")
        try:
            done = subprocess.run(
                [compiler, "-shared", "-fPIC", "-o", str(library), str(source)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return [Check(name, False, f"{compiler} cannot be run: {error}")]
        if done.returncode:
            words = done.stderr.strip().splitlines() or ["no reason was given"]
            return [Check(name, False, f"{compiler} cannot link a library: {words[-1]}")]
        ok, words_ = _try(f"import ctypes; assert ctypes.CDLL({str(library)!r}).answer() == 42")
    return [Check(name, ok, compiler if ok else f"what {compiler} links cannot be loaded: {words_}")]


# The machine --------------------------------------------------------


def _cpu() -> Found:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    field = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    features = cpu.features()
    vector = [
        name for name in ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_tile") if name in features
    ]
    detail = f"{field.get('model name', platform.machine())}: {', '.join(vector) or 'no vector features known'}"
    try:
        model = (int(field.get("cpu family", 0)), int(field.get("model", 0)))
    except ValueError:
        model = (0, 0)
    usual = model in AMD_ZEN4 or model in INTEL_SERVERS
    if usual and "avx512f" not in features:
        detail += "; this family of CPUs has AVX-512, and the hypervisor of this machine hides it"
    return [Check("cpu", True, detail)]


def _cores() -> Found:
    usable = cpu.cores()
    quota = _quota()
    detail = f"{usable} of {os.cpu_count()} usable"
    if quota is not None and quota < usable:
        detail += f"; a container quota leaves {quota:g} cores: bench with --threads {max(1, int(quota))}"
    return [Check("cores", True, detail)]


def _quota() -> float | None:
    """Cores that a container's CPU quota leaves, if there is one."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _folder(name: str, folder: Path) -> Found:
    """Whether files can be written there, and how much room is left."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        return [Check(name, False, f"cannot write in '{there}': {error.strerror}; choose another folder")]
    left = shutil.disk_usage(there).free
    low = left < ROOM
    return [Check(name, not low, f"{folder}, {left / 1e9:.1f} GB free" + ("; that is too little" if low else ""))]


def _default_store() -> Path:
    from saevit_tvm.tuning.store import default_root

    return default_root()


# What can be built, and compared with -------------------------------


def _targets() -> Found:
    """One line a target: ready, or what is missing to build it, or to prove what was built."""
    code = (
        "import json, tvm; from saevit_tvm.backends import how_to_run, require, why_not\n"
        "from saevit_tvm.targets import all_targets\n"
        "from saevit_tvm.support.errors import TargetError\n"
        "def needs(t):\n"
        "    try: return require(t)\n"
        "    except TargetError as error: return str(error)\n"
        "rows = []\n"
        "for t in all_targets():\n"
        "    tvm.target.Target(t.tvm)\n"
        "    rows.append([t.name, needs(t), how_to_run(t), why_not(t), t.emulator])\n"
        "print(json.dumps(rows))"
    )
    ok, words = _try(code)
    if not ok:
        return [Check("targets", False, f"cannot be listed: {words}")]
    return [_target(*row) for row in json.loads(words)]


def _target(name: str, needs: str | None, how: str | None, why: str, emulator: str | None) -> Check:
    ways = {
        "host": "ready",
        "qemu": f"ready; verified under qemu, {emulator} model",
        None: f"can be built, not verified here: {why}",
    }
    return Check(f"target {name}", needs is None, needs or ways[how], name == "native")


def _emulation() -> Found:
    """What verifying foreign artifacts takes: qemu, libraries, and TVM's runtime for their architecture."""
    from saevit_tvm.emulators import qemu
    from saevit_tvm.support.cache import cache_folder

    name = "emulation of aarch64"
    lacking = qemu.missing("aarch64")
    if lacking:
        return [Check(name, False, lacking, needed=False)]
    kept = "is" if qemu.has_runtime("aarch64") else "will be downloaded once and kept"
    detail = f"{qemu.find('aarch64')}; TVM's runtime for it {kept} in {cache_folder()}"
    return [Check(name, True, detail, needed=False)]


def _cuda() -> Found:
    """NVIDIA's compiler, which makes the kernels of CUDA targets, and what runs them where there is no GPU."""
    from saevit_tvm.emulators import cuda

    code = (
        "import sys; from saevit_tvm.backends import nvrtc\n"
        "print(sys.exit(nvrtc.missing()) if nvrtc.missing() else f'{nvrtc.version()} in {nvrtc.folder()}')"
    )
    lacking = cuda.missing()
    return [
        Check("CUDA compiler", *_try(code), needed=False),
        Check("CUDA kernels on this CPU", lacking is None, lacking or "with g++, where there is no GPU", needed=False),
    ]


def _peers() -> Found:
    checks = []
    for peer in peers.PEERS:
        missing = peer.missing()
        detail = f"not installed, bench will do without: pip install {peer.install}" if missing else "installed"
        checks.append(Check(f"bench against {peer.name}", not missing, detail, needed=False))
    return checks
