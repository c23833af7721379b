"""What many tests share: one small model compiled once, and the command line as a user runs it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saevit_tvm.support import cpu
from saevit_tvm.support.child import collect_seldom

ROOT = Path(__file__).parents[1]

# Several tests run at a time, and PyTorch's threads spin while they wait for each other: left alone, a build beside
# another takes two thirds more of the CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
collect_seldom()

# With SAEVIT_TVM_ALL_TOOLS set, as in CI, a test that is skipped has failed: every tool was installed for it. What is
# left to the machine is who may mount and cut off networks, its processors, and three runtimes with conflicting pins.
ALL_TOOLS = "SAEVIT_TVM_ALL_TOOLS" in os.environ
MAY_BE_LACKING = re.compile(
    "(mnn|executorch|litert) is not installed|mounting a (tmpfs|small file system) needs root"
    "|a tmpfs cannot be mounted here|no tmpfs can be mounted here: .*|this system lets no process leave the network"
    "|one core shows nothing|this CPU runs every target there is|LLVM's names of this architecture"
    "|this machine has a GPU"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _no_tool_lacks((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _no_tool_lacks((yield))


def _no_tool_lacks(report):
    if ALL_TOOLS and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not MAY_BE_LACKING.fullmatch(reason.removeprefix("Skipped: ")):
            report.outcome, report.longrepr = "failed", f"{reason} (and SAEVIT_TVM_ALL_TOOLS is set)"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs another artifact than the smallest one for this machine waits for a build of its own."""
    for item in items:
        needs = getattr(item, "fixturenames", ())
        if "made_once" in needs and "micro_artifact" not in needs:
            item.add_marker("slow")


SLOW = 3.0  # seconds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What is not marked as slow and was: told, as it depends on the machine, and no failure."""
    took: Counter[str] = Counter()
    for report in (each for kind in terminalreporter.stats.values() for each in kind):
        if isinstance(report, pytest.TestReport) and report.when != "teardown" and "slow" not in report.keywords:
            took[report.nodeid.partition("[")[0]] += report.duration
    for name, seconds in took.most_common():
        if seconds > SLOW:
            terminalreporter.write_line(f"{seconds:.1f} s, and not marked as slow: {name}")


@pytest.fixture(scope="session", autouse=True)
def _own_tuning_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the records of whoever runs it."""
    os.environ["SAEVIT_TVM_STORE"] = str(tmp_path_factory.mktemp("store"))


# What many tests share is made once: for all workers, and for later runs while nothing changes that it is made from.
MADE_FROM = ("saevit_tvm", "relay_patterns", "schedules", "tuning_logs", "benchmarks", "pyproject.toml")
SHARED = ROOT / ".pytest_cache" / "shared"


def _content() -> str:
    """The digest of all that an artifact depends on: our files, the packages installed, this CPU."""
    digest = hashlib.sha256()
    for name in MADE_FROM:
        files = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    digest.update("\n".join(sorted(f"{each.name} {each.version}" for each in metadata.distributions())).encode())
    digest.update(f"{sorted(cpu.features())} {cpu.cores()}".encode())
    return digest.hexdigest()[:20]


@pytest.fixture(scope="session")
def made_once() -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): the folder that make(folder) has filled, now or earlier. Tests only read in it."""
    place = SHARED / _content()

    def made(name: str, make: Callable[[Path], object]) -> Path:
        SHARED.mkdir(parents=True, exist_ok=True)
        with (SHARED / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / name).exists():
                for old in SHARED.glob(f"*/{name}"):
                    shutil.rmtree(old)
                unfinished = place / f".{name}.{os.getpid()}"
                unfinished.mkdir(parents=True)
                make(unfinished)
                unfinished.rename(place / name)
        return place / name

    return made


@pytest.fixture(scope="session")
def built_once(made_once: Callable[..., Path]) -> Callable[..., Path]:
    """built_once(name, target=.., ..): an artifact of the smallest model, and what stands beside it."""

    def built(name: str, dump_ir: Path | None = None, **options) -> Path:
        from saevit_tvm.verbs.build import BuildOptions, build

        def make(folder: Path) -> None:
            dump = None if dump_ir is None else folder / dump_ir
            build(BuildOptions("saevit_micro", out=folder, name="micro", dump_ir=dump, **options), lambda _line: None)

        return made_once(name, make) / "micro.so"

    return built


@pytest.fixture(scope="session")
def micro_artifact(built_once: Callable[..., Path]) -> Path:
    """The smallest model at 64x64, built and verified for this machine."""
    return built_once("micro", image_size=64)


@pytest.fixture(scope="session")
def digits_artifact(built_once: Callable[..., Path]) -> Path:
    """The smallest model with weights that know something: one picture of a digit or four at a time."""
    return built_once("digits", weights="digits", batch=(4, 1))


@pytest.fixture(scope="session")
def rpi5_artifact(built_once: Callable[..., Path]) -> Path:
    """The same for a Raspberry Pi 5, verified under qemu."""
    return built_once("rpi5", target="rpi5", image_size=64)


@pytest.fixture(scope="session")
def opencl_artifact(built_once: Callable[..., Path]) -> Path:
    """The smallest model at 32x32 for an OpenCL device, verified on whatever driver there is."""
    from saevit_tvm.runtime import opencl

    if not opencl.available()[0]:
        pytest.skip(opencl.available()[1])
    return built_once("opencl", image_size=32, target="generic-opencl")


@pytest.fixture(scope="session")
def give_plugin() -> Callable[[Path], None]:
    """give_plugin(cache) puts the OpenCL plugin there, which takes a core seven seconds to compile."""
    from saevit_tvm.runtime.opencl import plugin

    compiled = plugin.library()

    def give(cache: Path) -> None:
        (cache / "plugins").mkdir()
        shutil.copy2(compiled, cache / "plugins")

    return give


@pytest.fixture(scope="session")
def failing_opencl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the machine's own OpenCL library can be made to fail: see runtime/failing_opencl.c."""
    folder = tmp_path_factory.mktemp("failing")
    maps = "import ctypes; ctypes.CDLL('libOpenCL.so.1'); print(open('/proc/self/maps').read())"
    mapped = subprocess.run([sys.executable, "-c", maps], capture_output=True, text=True, check=False).stdout
    found = [line.split()[-1] for line in mapped.splitlines() if "/libOpenCL.so" in line]
    if not found:
        pytest.skip("there is no OpenCL library")
    real, shim = folder / "libreal.so", folder / "libOpenCL.so.1"
    for line in (
        ["-Wl,-soname,libreal.so", "-x", "c", "/dev/null", "-o", real],
        [ROOT / "tests" / "runtime" / "failing_opencl.c", "-Wl,--no-as-needed", real, "-Wl,-rpath,$ORIGIN", "-o", shim],
    ):
        subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", *map(str, line)], check=True)
    real.unlink()
    real.symlink_to(found[0])
    return {"LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="session")
def cuda_artifact(built_once: Callable[..., Path]) -> Path:
    """The smallest model at 32x32 for one NVIDIA architecture, at a batch that no tile divides; not run."""
    from saevit_tvm.backends import nvrtc

    if lacking := nvrtc.missing():
        pytest.skip(lacking)
    return built_once("cuda", target="cuda-sm_90", batch=17, image_size=32, dump_ir=Path("ir"))


@pytest.fixture(scope="session")
def fake_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which there is a GPU that computes nothing."""
    from saevit_tvm.emulators import cuda as emulated

    if lacking := emulated.missing():
        pytest.skip(lacking)
    return {"LD_PRELOAD": str(emulated.driver(tmp_path_factory.mktemp("fake")))}


@pytest.fixture(scope="session")
def held_out() -> tuple[np.ndarray, np.ndarray]:
    """The digits that the shipped checkpoint has not seen, as the model wants them, and what they are."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from saevit_tvm.models.opening import open_model
    from saevit_tvm.runtime.preprocess import to_array

    sys.path.insert(0, str(ROOT / "scripts"))
    from train_digits import pictures

    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=360, random_state=0, stratify=digits.target)
    preprocessing = open_model("saevit_micro", weights="digits").preprocessing
    return np.concatenate([to_array(image.convert("RGB"), preprocessing) for image in pictures(split[1])]), split[3]


@pytest.fixture(scope="session")
def forks() -> Iterator[Any]:
    """Programs in processes of their own that need not import what this one has."""
    sys.path.insert(0, str(ROOT / "tests"))
    from forks import Forks

    started = Forks()
    yield started
    started.end()


@pytest.fixture(scope="session")
def cli(forks: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own."""
    return forks.command
