"""One small model as an SDK of both flavours, made once, and a compiler for the programs that hold it to account."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LINKED = ("-lpthread", "-lm", "-ldl")


@pytest.fixture(scope="session")
def artifact(built_once: Callable[..., Path]) -> Path:
    return built_once("small", image_size=32)


@pytest.fixture(scope="session")
def kit(artifact: Path, made_once: Callable[..., Path]) -> Path:
    from saevit_tvm.verbs.sdk import SdkOptions, sdk

    def make(folder: Path) -> None:
        made = sdk(SdkOptions(artifact, folder / "sdk", "both"), say=lambda _line: None)
        assert all(proof["passed"] for proof in made["verification"].values())

    return made_once("kit", make) / "sdk"


def compile_c(output: Path, arguments: Sequence[str | Path], compiler: Sequence[str] = ("gcc", "-std=c11")) -> Path:
    flags = ["-O1", "-g", "-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Werror"]
    command = [*compiler, *flags, *map(str, arguments), *LINKED, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def sources(kit: Path, flavour: str) -> list[Path]:
    """The flavour's runtime, to be compiled with whatever flags."""
    source = kit / "src"
    objects = [kit / "lib" / "saevit_model.o"] if flavour == "static" else []
    return [*sorted(source.glob("*.c")), *sorted((source / flavour).glob("*.c")), *objects]


@pytest.fixture
def program(kit: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """program("api.c", "static", ...) compiles a test with a flavour's sources; the command that runs it."""

    def build(name: str, flavour: str, *flags: str, compiler: Sequence[str] = ("gcc", "-std=c11")) -> list[str]:
        main = HERE / name if (HERE / name).exists() else kit / "example" / name
        parts = [f"-I{kit / 'include'}", *flags, main, *sources(kit, flavour)]
        made = compile_c(tmp_path / f"{main.stem}-{flavour}", parts, compiler)
        return [str(made)]

    return build


@pytest.fixture
def shared_arguments(kit: Path) -> list[str]:
    """Where the shared flavour finds its artifact and TVM's runtime."""
    return [str(kit / "lib" / "micro.so"), str(kit / "lib")]


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Path]:
    return compile_c


@pytest.fixture(scope="session")
def runtime_sources() -> Callable[[Path, str], list[Path]]:
    return sources
