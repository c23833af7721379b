"""Programs in processes of their own that need not import TVM and PyTorch first, which is most of what they do.

Started as a program, it imports them once, and none of our modules. Then it reads what to run, a line of JSON each,
does so in a fork of itself, and says how that ended.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

OURS = ("saevit_tvm", "relay_patterns", "schedules")


def serve() -> None:
    del sys.path[0]  # the folder of the tests
    from saevit_tvm.support.child import collect_seldom, die_with_parent
    from saevit_tvm.support.tvm_first import load_tvm_first

    die_with_parent()
    collect_seldom()
    load_tvm_first()  # as the command line does it
    for name in ("torch._dynamo", "torch.export._trace", "tvm.relax.frontend.torch"):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    gc.freeze()  # what is shared is not looked through, and so not copied
    for line in sys.stdin:
        fork = os.fork()
        if fork == 0:
            _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)


def _become(
    program: str | None,
    arguments: list[str],
    seconds: int,
    folder: str,
    environment: dict[str, str],
    out: str,
    err: str,
) -> NoReturn:
    """What Python does before it runs `python PROGRAM ARGUMENTS` or `python -m saevit_tvm ARGUMENTS`, and then that."""
    signal.alarm(seconds)
    for descriptor, path in enumerate((os.devnull, out, err)):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [program or "saevit-tvm", *arguments]
    sys.path.insert(0, folder if program is None else str(Path(program).parent))
    status = None
    try:
        if program is None:
            importlib.import_module("saevit_tvm.cli").main()
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
    if program is not None:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    # What was imported is shared: to take it apart would be most of what a fork does.
    os._exit(1 if isinstance(status, str) else status or 0)


class Forks:
    """The other side. The program is started when it is first needed."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def command(self, *arguments: str | Path, timeout: int = 600, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command's status and words. What has an environment of its own is no fork: the loader may read it, too."""
        words = [str(argument) for argument in arguments]
        if options.keys() - {"cwd"}:
            command = [sys.executable, "-m", "saevit_tvm", *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
        return self._fork(None, words, timeout, options.get("cwd"))

    def script(self, path: Path, *arguments: str, timeout: int, cwd: Path) -> subprocess.CompletedProcess[str]:
        """A script's status and words."""
        return self._fork(str(path), list(arguments), timeout, cwd)

    def _fork(
        self, program: str | None, words: list[str], timeout: int, cwd: Path | None
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            asked = {"program": program, "arguments": words, "seconds": timeout, "folder": str(cwd or Path.cwd())}
            asked |= {"environment": dict(os.environ), "out": out.name, "err": err.name}
            status = self._ask(json.dumps(asked))
            if status == -signal.SIGALRM:
                raise subprocess.TimeoutExpired(words, timeout, err.read())
            return subprocess.CompletedProcess(words, status, out.read(), err.read())

    def _ask(self, line: str) -> int:
        if self._server is None:
            command = [sys.executable, __file__]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._server.stdin and self._server.stdout
        print(line, file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def end(self) -> None:
        if self._server is not None:
            self._server.communicate()


if __name__ == "__main__":
    serve()
