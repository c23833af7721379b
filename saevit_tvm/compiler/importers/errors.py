"""What an importer's error says, in one line."""

from __future__ import annotations

from saevit_tvm.support import process


def reason(error: Exception) -> str:
    return process.last_line(str(error), type(error).__name__)
