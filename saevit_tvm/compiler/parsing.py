"""TVM's parser asks Python for the stack twice a function, with a line of source for every frame.

Python looks for these lines in all modules there are, which is most of the time that parsing takes: 20 ms a function in
a short program, and a minute where one of TVM's rules imports its tensor intrinsics. The parser needs the frames, and
the line of one of them. So it gets them as they are, and the lines from where Python keeps them.
"""

from __future__ import annotations

import inspect
import linecache
import sys
import types

from tvm.tirx.script.parser import entry


def stack(_context: int = 1) -> list[inspect.FrameInfo]:
    """The same as inspect.stack()."""
    found = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code, number = frame.f_code, frame.f_lineno
        line = linecache.getline(code.co_filename, number, frame.f_globals)
        found.append(inspect.FrameInfo(frame, code.co_filename, number, code.co_name, [line] if line else None, 0))
        frame = frame.f_back
    return found


def make_quick() -> None:
    ours = types.ModuleType("inspect")
    ours.__dict__.update(vars(inspect), stack=stack)
    vars(entry)["inspect"] = ours
