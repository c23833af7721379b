"""rpc-server: the program that lets a board take part in tuning and verifying, in one folder to copy there.

The board needs no Python: the program is C, and TVM's runtime libraries lie beside it.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from saevit_tvm import backends, targets
from saevit_tvm.emulators import qemu
from saevit_tvm.runtime import elf
from saevit_tvm.support import process, toolchain, workspace
from saevit_tvm.support.errors import CompileError, TargetError
from saevit_tvm.targets import Target

PROGRAM = "rpc-server"
README = """\
An RPC server for saevit-tvm, target {target}. The board needs nothing else{driver}.

1. Copy this folder to the board:       scp -r {folder} BOARD:rpc
2. On your machine, start a tracker:    python -m tvm.exec.rpc_tracker --port 9190
3. On the board, start the server:      ./rpc/{program} --tracker YOUR-MACHINE:9190 --key {target}
4. On your machine, see that it came:   saevit-tvm doctor --rpc localhost:9190
5. Tune on it, verify on it:            saevit-tvm tune --target {target} --measure rpc://localhost:9190/{target}
                                        saevit-tvm verify ARTIFACT --device rpc://localhost:9190/{target}

Whoever reaches its port can run code on the board: use it in a network that you trust.
"""


def rpc_server(target: str, out: Path) -> dict[str, Any]:
    """Compile the server for a target and put it into `out`, with its libraries and how to start it."""
    chosen = targets.get(target)
    libraries, backend = _libraries(chosen), backends.get(chosen.kind)
    with workspace.staging(out) as folder:
        files = [folder / PROGRAM, folder / "README.txt", *(folder / name for name in libraries)]
        files += [folder / name for name in backend.board_files]
        finished = [(file, out / file.name) for file in files]
        workspace.free(*(place for _, place in finished))
        for name, library in libraries.items():
            shutil.copyfile(library, folder / name)
        compiled(chosen, folder)
        backend.add_to(folder, chosen)
        (folder / "README.txt").write_text(_readme(chosen, out))
        workspace.place(finished)
    return {
        "target": chosen.name,
        "program": str(out / PROGRAM),
        "readme": str(out / "README.txt"),
        "libraries": [str(place) for _, place in finished if place.suffix == ".so"],
        "bytes": sum(place.stat().st_size for _, place in finished),
    }


def _readme(target: Target, out: Path) -> str:
    driver = backends.get(target.kind).driver
    return README.format(target=target.name, folder=out, program=PROGRAM, driver=driver)


def compiled(target: Target, folder: Path) -> None:
    """Compile the program for a target, beside TVM's runtime libraries in the folder."""
    chosen = toolchain.linker(target)
    line = [*chosen.cc_argv, "-std=gnu11", "-O2", "-Wall", f"-I{_package('tvm_ffi') / 'include'}"]
    line += [str(resources.files("saevit_tvm.measure") / "rpc_server.c"), "-o", str(folder / PROGRAM)]
    line += ["-Wl,--no-as-needed", *(str(folder / name) for name in qemu.RUNTIME)]
    line += ["-Wl,--as-needed", "-ldl", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"]
    done = process.run(line)
    if done.returncode:
        words = process.first_error(done.stderr)
        raise CompileError(f"'{chosen.cc_argv[0]}' cannot compile the RPC server for {target.name}: {words}.")
    found = elf.read(folder / PROGRAM)
    if found.machine != target.arch:
        raise CompileError(f"'{chosen.cc_argv[0]}' made {found}, not for {target.arch}: use another compiler.")


def _libraries(target: Target) -> dict[str, Path]:
    """TVM's runtime for the target, by file name."""
    if target.android or target.output != "library":
        raise TargetError(
            f"there is no RPC server for target '{target.name}': TVM publishes its runtime for Linux only; "
            "use the RPC app of TVM's source tree there."
        )
    if target.arch != platform.machine():
        backends.get(target.kind).check_foreign(target)
        folder = qemu.foreign_runtime(target.arch)
        return {name: folder / name for name in qemu.RUNTIME}
    found = {name: _package("tvm_ffi" if "ffi" in name else "tvm") / "lib" / name for name in qemu.RUNTIME}
    return found | backends.get(target.kind).runtime_libraries()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
