"""However a command ends: one sentence on stderr, the right exit status, and nothing left half-written.

A stop signal becomes a KeyboardInterrupt, which unwinds what is open. But the compiler can sit in C++ for
many seconds without coming back to Python, and a library may swallow the exception; so a watching thread,
woken by the signal itself, ends the process when it has not ended by then (or at the second Ctrl-C).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType

from saevit_tvm.support.errors import SaevitError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLEAR = "\x1b[2K"  # a terminal's line, of which progress may have filled any part
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


class Guard:
    """Runs a whole command and turns whatever happens into an exit status."""

    def __init__(self) -> None:
        self.debug = False
        self.patience = 1.5  # seconds between a stop signal and the end by force
        self.kept = "nothing was left behind"  # what the sentence about a stop says of the work
        self.stderr = os.dup(2)  # stays ours when descriptor 2 is silenced
        self._signal: int | None = None
        self._said = threading.Lock()

    def run(self, work: Callable[[Guard], int]) -> int:
        """The exit status of `work`. After a stop signal it does not return: the process ends here."""
        try:
            self._listen()
            status = work(self)
            self._listen_no_more()
            return status
        except BaseException as error:
            try:
                status = self._explain(error)
            except KeyboardInterrupt:  # a second signal while the first is being explained
                status = self._stopped()
        if self._signal is not None:
            os._exit(status)  # everything is unwound, and the interpreter's own end may take seconds
        return status

    def _listen(self) -> None:
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
                signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(woken,), daemon=True, name="stop-watch").start()

    def _listen_no_more(self) -> None:
        """The work is done and said: a signal while the interpreter takes itself apart must not deny it."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        raise KeyboardInterrupt

    def _watch(self, woken: int) -> None:
        signals: list[int] = []
        while not signals:
            signals = [number for number in os.read(woken, 64) if number in STOP_SIGNALS]
        if len(signals) == 1:
            select.select([woken], [], [], self.patience)
        from saevit_tvm.support import workspace

        self._signal = signals[0]
        workspace.abandon()
        os._exit(self._stopped())

    def _stopped(self) -> int:
        number = self._signal or signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._say(f"stopped by {name}; {self.kept}.")
        return 128 + number

    def _say(self, sentence: str) -> None:
        # Once only: the watching thread and the main one may both get here.
        if self._said.acquire(blocking=False):
            with contextlib.suppress(OSError):
                clear = CLEAR if os.isatty(self.stderr) else ""
                os.write(self.stderr, f"{clear}saevit-tvm: {' '.join(sentence.split())}\n".encode(errors="replace"))

    def _explain(self, error: BaseException) -> int:
        """Say what happened; the exit status."""
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        # A KeyboardInterrupt inside a callback from C++ may come out as any exception at all.
        if isinstance(error, KeyboardInterrupt) or self._signal is not None:
            return self._stopped()
        if isinstance(error, BrokenPipeError):
            _drop_output()
            return EXIT_BROKEN_PIPE
        if self.debug:
            with os.fdopen(os.dup(self.stderr), "w") as stream:
                traceback.print_exception(error, file=stream)
        sentence, status = describe(error)
        self._say(sentence)
        return status


def describe(error: BaseException) -> tuple[str, int]:
    """An exception as a sentence and an exit status."""
    if isinstance(error, SaevitError):
        return str(error), error.exit_status
    if isinstance(error, OSError) and error.strerror:
        where = f" '{error.filename}'" if error.filename else ""
        return f"the system refused a file operation{where}: {error.strerror}.", 1
    if isinstance(error, MemoryError):
        return "out of memory: free some, or use a smaller batch or image size.", 1
    first_line = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return (
        f"this is a bug in saevit-tvm ({type(error).__name__}: {first_line}): "
        "run the same command with --debug for the traceback, and report it.",
        1,
    )


def _drop_output() -> None:
    """The reader of stdout is gone; let nothing try to flush into the closed pipe at exit."""
    void = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(void, stream.fileno())
