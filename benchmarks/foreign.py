"""Other people's arm64 software, run under qemu: Debian's Python and wheels from PyPI, unpacked in the cache folder.

Nothing is installed and no setting of the system changes. It takes Debian (apt-get, dpkg-deb), pip and qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from saevit_tvm.emulators import qemu
from saevit_tvm.support.cache import cache_folder
from saevit_tvm.support.errors import TargetError

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
# The newest glibc that Debian's stable releases of the last years have in common.
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 37)] + ["manylinux2014_aarch64"]
# What the models of qemu call themselves in /proc/cpuinfo, by part number.
PARTS = {"cortex-a53": "0xd03", "cortex-a72": "0xd08", "cortex-a76": "0xd0b", "max": "0xd40"}


class Guest:
    """An arm64 Debian with Python and some packages from PyPI. qemu looks for absolute paths in it first."""

    def __init__(self, packages: Sequence[str], cpu: str, features: Sequence[str]) -> None:
        self._cpu = cpu
        self._root = _once("debian", _unpack_debian)
        (self.python,) = (path for path in (self._root / "usr/bin").glob("python3.*") if path.name[8:].isdigit())
        version = self.python.name.removeprefix("python")
        name = "-".join(["wheels", version, *sorted(packages)])
        self.site = _once(name, lambda folder: _unpack_wheels(packages, version, folder))
        self._describe_cpu(features)

    def _describe_cpu(self, features: Sequence[str]) -> None:
        """Libraries that look at /proc/cpuinfo would find this machine's, and onnxruntime crashes on that."""
        lines = [f"Features\t: {' '.join(features)}", "CPU implementer\t: 0x41", "CPU architecture: 8"]
        lines += ["CPU variant\t: 0x1", f"CPU part\t: {PARTS[self._cpu]}", "CPU revision\t: 0"]
        (self._root / "proc").mkdir(exist_ok=True)
        (self._root / "proc/cpuinfo").write_text(
            "".join("\n".join([f"processor\t: {core}", *lines]) + "\n\n" for core in range(2))
        )

    def run(self, code: str, *arguments: object, path: str = "", count: Path | None = None) -> str:
        """What a piece of Python prints; `path` is where else it may import from."""
        libraries = [self._root / folder / "aarch64-linux-gnu" for folder in ("lib", "usr/lib")]
        settings = {
            "PYTHONHOME": str(self._root / "usr"),
            "PYTHONPATH": f"{self.site}:{path}",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "OMP_NUM_THREADS": "1",
        }
        line = [str(qemu.find("aarch64")), "-cpu", self._cpu, "-L", str(self._root)]
        line += [part for name, value in settings.items() for part in ("-E", f"{name}={value}")]
        line += ["-plugin", f"{qemu.counter()},out={count}"] if count else []
        done = subprocess.run(
            [*line, str(self.python), "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            words = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise TargetError(f"a program for arm64 failed under qemu: {words[-1]}")
        return done.stdout


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, whole or not there."""
    place = cache_folder() / "arm64" / name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            make(fresh)
            fresh.rename(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return place


def _unpack_debian(root: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (Path(scratch) / folder).mkdir(parents=True)
        (Path(scratch) / "status").touch()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "root",
            "Dir::State": f"{scratch}/state",
            "Dir::State::status": f"{scratch}/status",
            "Dir::Cache": f"{scratch}/cache",
            "Debug::NoLocking": "1",
        }
        apt = ["apt-get", "-qq", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
        _do(*apt, "update")
        _do(*apt, "-y", "--no-install-recommends", "--download-only", "install", *PACKAGES)
        for package in (Path(scratch) / "cache/archives").glob("*.deb"):
            _do("dpkg-deb", "-x", str(package), str(root))


def _unpack_wheels(packages: Sequence[str], python: str, site: Path) -> None:
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    # Installing for another platform only unpacks.
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    _do(sys.executable, "-m", "pip", "install", *options, *platforms, "--target", str(site), *packages)


def _do(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        raise TargetError(f"'{command[0]}' is not there, and arm64 software is fetched with it: use Debian.") from error
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.startswith(("E:", "ERROR", "error"))]
        raise TargetError(f"'{command[0]}' failed: {words[-1] if words else 'it gave no reason'}")
