"""The C library: the same numbers as Python, the promises of its header, under every sanitizer."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from saevit_tvm.runtime import elf
from saevit_tvm.runtime.engine import load

Program = Callable[..., list[str]]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
COMPILERS = {
    "C11": ("gcc", "-std=c11"),
    "C++17": ("g++", "-std=c++17"),
}


def runs(command: Sequence[str | Path], **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_both_flavours_answer_as_python_does_bit_by_bit(
    artifact: Path, program: Program, shared_arguments: list[str], tmp_path: Path, threads: int
) -> None:
    inputs = np.random.RandomState(7).standard_normal((4, 1, 3, 32, 32)).astype(np.float32)
    inputs.tofile(tmp_path / "in")
    engine = load(artifact, threads=threads)
    expected = np.stack([engine(x) for x in inputs])
    for flavour, rest in (("static", []), ("shared", shared_arguments[:1])):
        command = program("tensor.c", flavour)
        runs([*command, tmp_path / "in", tmp_path / "out", threads, "0", *rest])
        got = np.fromfile(tmp_path / "out", np.float32).reshape(expected.shape)
        np.testing.assert_array_equal(got, expected, flavour)


@pytest.mark.slow
@pytest.mark.parametrize("language", list(COMPILERS))
def test_the_api_keeps_its_promises(
    kit: Path,
    compiled: Callable[..., Path],
    shared_arguments: list[str],
    tmp_path: Path,
    language: str,
) -> None:
    """Linked against the objects that the SDK brings, from C and from C++."""
    compiler = COMPILERS[language]
    for flavour, rest in (("static", []), ("shared", shared_arguments)):
        objects = [kit / "lib" / f"saevit_{flavour}.o"] + [kit / "lib" / "saevit_model.o"] * (flavour == "static")
        source = ["-x", compiler[1][5:].rstrip("0123456789"), Path(__file__).with_name("api.c"), "-x", "none"]
        made = compiled(tmp_path / f"api-{flavour}", [f"-I{kit / 'include'}", *source, *objects], compiler)
        assert runs([made, *rest]) == "0 failures\n"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flavour", ["static", "shared"])
def test_address_and_undefined_behaviour_sanitizers_find_nothing(
    program: Program, shared_arguments: list[str], compiler: str, flavour: str
) -> None:
    command = program("api.c", flavour, *SANITIZED, compiler=(compiler, "-std=c11"))
    assert runs([*command, *(shared_arguments if flavour == "shared" else [])]) == "0 failures\n"


@pytest.mark.slow
@pytest.mark.parametrize(("flavour", "compiler"), [("static", "gcc"), ("static", "clang"), ("shared", "clang")])
def test_thread_sanitizer_finds_nothing(
    program: Program, shared_arguments: list[str], flavour: str, compiler: str
) -> None:
    command = program("api.c", flavour, "-fsanitize=thread", compiler=(compiler, "-std=c11"))
    # TVM's libraries are not instrumented, so how their threads wait for one another cannot be seen.
    options = "halt_on_error=1 ignore_noninstrumented_modules=1"
    arguments = shared_arguments if flavour == "shared" else []
    assert runs([*command, *arguments], TSAN_OPTIONS=options) == "0 failures\n"


def test_in_its_callers_memory_the_static_flavour_allocates_nothing(program: Program) -> None:
    assert runs(program("frugal.c", "static")) == "0 allocations\n"


# What can be wrong with a file ------------------------------------------------


@pytest.fixture
def refused(program: Program, tmp_path: Path) -> Callable[..., str]:
    """What the shared flavour says of a file."""
    command = program("tensor.c", "shared", *SANITIZED)
    (tmp_path / "in").write_bytes(b"")

    def open_it(artifact: Path | str) -> str:
        arguments = [*command, str(tmp_path / "in"), str(tmp_path / "out"), "1", "0", str(artifact)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    return open_it


@pytest.mark.slow
def test_an_artifact_that_cannot_be_right_is_refused_before_it_is_loaded(
    artifact: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    data, bad = artifact.read_bytes(), tmp_path / "bad.so"

    def said(content: bytes) -> str:
        bad.write_bytes(content)
        return refused(bad)

    assert "cannot open" in refused(tmp_path / "missing.so")
    assert "not a library" in said(b"")
    assert "not a library" in said(b"#!/bin/sh\n")
    assert "no ordinary file" in refused("/proc/self/fd") or "not a library" in refused("/proc/self/fd")
    for length in (19, 20, 64, len(data) // 2, len(data) - 1):
        assert "not a library" in said(data[:length]) or "cut short" in said(data[:length])
    for position in (40, len(data) // 2, len(data) - 49, len(data) - 40):
        assert "damaged" in said(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    other = 183 if platform.machine() == "x86_64" else 62
    assert "another processor" in said(data[:18] + bytes([other]) + data[19:])


@pytest.mark.slow
def test_another_artifact_is_not_taken_for_this_one(
    artifact: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """Sealed as it should be, but not what the SDK's description describes."""
    content = artifact.read_bytes()[:-48]
    length = int.from_bytes(artifact.read_bytes()[-16:-8], "little")
    content = content[:-length] + content[-length:].replace(b"saevit_micro", b"saevit_mikro")
    other = tmp_path / "other.so"
    other.write_bytes(content + hashlib.sha256(content).digest() + struct.pack("<Q", length) + b"SAEVIT1\n")
    assert "not the artifact" in refused(other)


@pytest.mark.slow
def test_a_missing_or_unfit_runtime_is_a_sentence(artifact: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    shutil.copy(artifact, lonely / "micro.so")
    assert "libtvm_ffi.so" in refused(lonely / "micro.so")
    (lonely / "libtvm_ffi.so").write_bytes(b"\x7fELF and nothing else")
    assert "libtvm_ffi.so" in refused(lonely / "micro.so")
    empty = tmp_path / "empty.c"
    empty.write_text("int nothing;\n")
    for name in ("libtvm_ffi.so", "libtvm_runtime.so"):
        subprocess.run(["gcc", "-shared", "-fPIC", empty, "-o", lonely / name], check=True)
    assert "another version" in refused(lonely / "micro.so")


@pytest.mark.slow
def test_a_processor_that_lacks_a_feature_is_a_sentence(
    kit: Path, compiled: Callable[..., Path], runtime_sources: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(kit, tmp_path / "kit")
    model = folder / "src" / "model.c"
    text = model.read_text()
    for changed, word in (
        (text.replace("    NULL,\n", '    "avx1024",\n    NULL,\n'), "'avx1024'"),
        (text.replace(f'"{platform.machine()}"', '"vax"'), "vax"),
    ):
        assert changed != text
        model.write_text(changed)
        parts = [f"-I{folder / 'include'}", folder / "example" / "tensor.c", *runtime_sources(folder, "static")]
        made = compiled(tmp_path / "tensor", parts)
        done = subprocess.run([made, "/dev/null", tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 1 and word in done.stderr


def test_when_the_system_gives_no_more_threads_that_is_a_sentence(program: Program, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"")
    command = [*program("tensor.c", "static"), str(tmp_path / "in"), str(tmp_path / "out"), "256"]
    limit = (400 << 20, 400 << 20)  # of address space, of which every thread wants 8 MB
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit)
    )
    assert done.returncode == 1 and "no more threads" in done.stderr


# Fuzzing, memory, other machines ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flavour"), [("fuzz_artifact.c", "shared"), ("fuzz_image.c", "static")])
def test_a_few_seconds_of_fuzzing_find_nothing(
    kit: Path, artifact: Path, program: Program, tmp_path: Path, name: str, flavour: str
) -> None:
    flags = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    if name == "fuzz_image.c":
        flags += [f"-I{kit / 'example'}", str(kit / "example" / "png.c")]
    command = program(name, flavour, *flags, compiler=("clang", "-std=c11"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    data = artifact.read_bytes()
    picture = Path(__file__).parents[2] / "examples" / "digit-7.png"
    (corpus / "seed").write_bytes(data[:64] + data[-4096:] if flavour == "shared" else picture.read_bytes())
    options = ["-max_total_time=4", "-max_len=20000", "-timeout=20", "-rss_limit_mb=2048", "-seed=1"]
    # Through a shell, as the peak of memory that the fuzzer looks at begins with that of the process which starts it.
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    done = subprocess.run([*shell, *command, *options, corpus], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "DONE" in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["static", "shared"])
def test_memory_is_flat_over_many_inferences(program: Program, shared_arguments: list[str], flavour: str) -> None:
    times = 100_000 if flavour == "static" else 10_000
    command = program("soak.c", flavour, "-O2")
    early, late = map(int, runs([*command, times, 1, *shared_arguments[:1]]).split())
    assert late <= early + 16, f"{early} pages became {late}"


@pytest.mark.slow
def test_an_arm64_sdk_computes_the_same_under_qemu(
    tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]], built_once: Callable[..., Path]
) -> None:
    board_artifact = built_once("arm64", target="arm64", image_size=32)
    made = cli("sdk", board_artifact, "--flavour", "both", "--out", tmp_path / "sdk", "--json")
    assert made.returncode == 0, made.stderr
    for proof in json.loads(made.stdout)["verification"].values():
        assert proof["proof"] == "qemu" and proof["passed"] and proof["max_abs_error"] < 1e-5
    # One command, and the program that comes out needs nothing but the system's calls.
    subprocess.run(["make", "-s", "-C", tmp_path / "sdk", "LDFLAGS=-static"], check=True)
    program = tmp_path / "sdk" / "classify-static"
    assert elf.read(program) == ("ELF", "program", "aarch64")
    picture = Path(__file__).parents[2] / "examples" / "digit-7.png"
    assert "%  class" in runs(["qemu-aarch64", "-cpu", "cortex-a53", program, picture])


@pytest.mark.slow
def test_an_android_sdk_runs_without_androids_libraries_and_compiles_with_others(
    tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]], built_once: Callable[..., Path]
) -> None:
    """No NDK is here: glibc stands in for Android's C library."""
    pytest.importorskip("ziglang")
    board_artifact = built_once("android-arm64", target="android-arm64", image_size=32)
    kit = tmp_path / "sdk"
    made = cli("sdk", board_artifact, "--out", kit, "--json")
    assert made.returncode == 0, made.stderr
    proof = json.loads(made.stdout)["verification"]["static"]
    assert proof["proof"] == "qemu" and proof["passed"] and proof["max_abs_error"] < 1e-5
    assert "another C library" in proof["note"]
    # Nothing that is compiled for another C library than Android's is handed over.
    assert [path.name for path in (kit / "lib").iterdir()] == ["saevit_model.o"] and not (kit / "pkgconfig").exists()
    assert "adb push" in (kit / "README.md").read_text()
    subprocess.run(["make", "-s", "-C", kit, "classify-static"], check=True)
    headers = subprocess.run(["readelf", "-lW", kit / "classify-static"], capture_output=True, text=True, check=True)
    assert "INTERP" not in headers.stdout and elf.read(kit / "classify-static") == ("ELF", "program", "aarch64")
    # As an NDK's toolchain file does it, which looks for packages below its own root alone.
    user, toolchain = tmp_path / "CMakeLists.txt", tmp_path / "toolchain.cmake"
    user.write_text(
        "cmake_minimum_required(VERSION 3.10)\nproject(user C)\n"
        f"find_package(saevit REQUIRED PATHS {kit}/cmake NO_CMAKE_FIND_ROOT_PATH)\n"
        f"add_executable(classify {kit}/example/classify.c {kit}/example/png.c)\n"
        "target_link_libraries(classify saevit::static)\n"
    )
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\nset(ANDROID 1)\n"
        "set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)\nset(CMAKE_EXE_LINKER_FLAGS -static)\n"
        f"set(CMAKE_FIND_ROOT_PATH {tmp_path}/root)\nset(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)\n"
    )
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", tmp_path, "-B", build, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"],
        ["cmake", "--build", build],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    picture = Path(__file__).parents[2] / "examples" / "digit-7.png"
    answers = [
        runs(["qemu-aarch64", "-cpu", "cortex-a53", program, picture])
        for program in (kit / "classify-static", build / "classify")
    ]
    assert answers[0] == answers[1] and "%  class" in answers[0]
    segments = subprocess.run(["readelf", "-lW", build / "classify"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in segments.splitlines() if line.split()[:1] == ["LOAD"]} == {"0x4000"}
