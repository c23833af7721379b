"""The cross compilers are found, or asked for by name; and what they make is read, not trusted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saevit_tvm import backends, targets
from saevit_tvm.compiler import library
from saevit_tvm.runtime import elf
from saevit_tvm.support import toolchain
from saevit_tvm.support.errors import CompileError, TargetError
from saevit_tvm.targets.base import Target

FOREIGN = [target for target in targets.all_targets()[1:] if target.arch != "x86_64"]
ARM64 = targets.get("arm64")
has_zig = importlib.util.find_spec("ziglang") is not None or shutil.which("zig") is not None


def tiny(target: Target) -> Any:
    """An executable of one small kernel and one constant."""
    import numpy as np
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 16), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.add(relax.op.nn.relu(x), relax.const(np.ones(16, "float32"))))
            result = builder.emit_output(y)
        builder.emit_func_output(result)
    return tvm.compile(builder.get(), tvm.target.Target(target.tvm))


def link(target: Target, path: Path) -> None:
    """The same, linked by what the target's backend uses."""
    executable = tiny(target)
    if target.output == "library":
        library.link_shared(executable, target, path)
    else:
        backends.get(target.kind).link(SimpleNamespace(executable=executable, target=target), path)


def only(name: str, target: Target = ARM64) -> Target:
    """The same target with one compiler to choose from."""
    fields = {field: getattr(target, field) for field in target.__dataclass_fields__}
    return Target(**fields | {"linkers": (name,)})


@pytest.mark.slow
@pytest.mark.parametrize("target", FOREIGN, ids=lambda target: target.name)
def test_every_target_gets_code_for_its_own_machine(target: Target, tmp_path: Path) -> None:
    if target.linkers == ("zig",) and not has_zig:
        pytest.skip("needs ziglang")
    link(target, tmp_path / "tiny")
    if target.output == "library":
        assert elf.read(tmp_path / "tiny") == ("ELF", "shared library", target.arch)
        return
    with tarfile.open(tmp_path / "tiny") as tar:
        tar.extractall(tmp_path / "objects")
    made = {elf.read(path) for path in (tmp_path / "objects").glob("*.o")}
    assert made == {elf.Binary("WebAssembly" if target.arch == "wasm32" else "Mach-O", "object file", target.arch)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aarch64-linux-gnu-gcc", "clang", "zig"])
def test_every_compiler_can_link(name: str, tmp_path: Path) -> None:
    target = only(name)
    try:
        found = toolchain.linker(target)
    except TargetError:
        pytest.skip(f"needs {name}")
    assert found.origin == name.removeprefix("aarch64-linux-gnu-")
    link(target, tmp_path / "tiny.so")
    assert elf.read(tmp_path / "tiny.so") == ("ELF", "shared library", "aarch64")


@pytest.mark.skipif(not has_zig, reason="needs ziglang")
def test_an_android_library_needs_no_library_of_androids(tmp_path: Path) -> None:
    source, out = tmp_path / "a.c", tmp_path / "a.so"
    source.write_text("""
        void *memcpy(void *, const void *, unsigned long), *memset(void *, int, unsigned long), left_open(void);
        float expf(float);
        float f(char *a, char *b, float x) { memset(a, 0, x); memcpy(a, b, x); left_open(); return expf(x); }
    """)
    chosen = toolchain.linker(targets.get("android-arm64"))
    subprocess.run(chosen.shared(["-fno-builtin", str(source)], str(out)), check=True)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", out], capture_output=True, text=True, check=True)
    assert symbols.stdout.split() == ["U", "left_open"]


@pytest.mark.skipif(not has_zig, reason="needs ziglang")
def test_android_programs_get_a_c_library_that_is_there_or_zigs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    phone = targets.get("android-arm64")
    if toolchain.sysroot("aarch64"):
        assert toolchain.programs(phone).origin in ("gcc", "clang")
    monkeypatch.setenv("PATH", str(tmp_path))
    alone = toolchain.programs(phone)
    assert alone.origin == "zig" and {"aarch64-linux-musl", "-static"} < set(alone.cc_argv)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(TargetError, match="apt install gcc-aarch64-linux-gnu or pip install ziglang") as error:
        backends.require(ARM64)
    assert "target 'arm64' needs a C compiler for aarch64-linux-gnu" in str(error.value)
    with pytest.raises(TargetError, match="apt install gcc-riscv64-linux-gnu"):
        backends.require(targets.get("riscv64"))
    with pytest.raises(TargetError, match=r"for aarch64-linux-android.*\(pip install ziglang\)"):
        backends.require(targets.get("android-arm64"))
    backends.require(targets.get("apple-silicon"))


@pytest.mark.slow
def test_the_command_line_asks_before_it_compiles(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ziglang'] = None")  # as if not installed
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    target = '{"kind": "llvm", "mtriple": "riscv64-linux-gnu", "mattr": ["+d"]}'
    done = cli("build", "--model", "saevit_micro", "--target", target, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and "compiling" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("saevit-tvm: target 'custom' needs a C compiler for riscv64")


def test_a_linker_that_fails_is_quoted(tmp_path: Path) -> None:
    target = only("cc")
    with pytest.raises(CompileError, match=r"linking tiny.so with '.*cc' failed: .+") as error:
        link(target, tmp_path / "tiny.so")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("made", "words"), [("-shared", "an ELF shared library for x86_64"), ("-c", "object file")])
def test_a_compiler_that_makes_something_else_is_found_out(
    made: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It succeeds, and what it made is for the wrong machine."""
    compiler = tmp_path / "aarch64-linux-gnu-gcc"
    work = f'echo "int x;" | {shutil.which("cc")} -fPIC {made} -x c - -o "$2"'
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n{work}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(CompileError, match=f"the compiler made .*{words}.*a shared library for aarch64 was asked for"):
        link(ARM64, tmp_path / "tiny.so")
