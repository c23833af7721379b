"""What the first bytes of a file say that it is: for which machine, and whether a library, an object or a program.

They are read before dlopen sees a file, because dlopen's own message names neither machine, and after every link,
because compilers and linkers have been seen to succeed with code for another machine than the one asked for.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

MAGIC = b"\x7fELF"
HEADER_SIZE = 64

_SHARED = "shared library"
_KINDS = {1: "object file", 2: "program", 3: _SHARED}

# (e_machine, 64 bit, little endian) -> the name that platform.machine() has for it.
_MACHINES = {
    (3, False, True): "i686",
    (40, False, True): "armv7l",
    (62, True, True): "x86_64",
    (183, True, True): "aarch64",
    (243, True, True): "riscv64",
}

# Mach-O, 64 bit, little endian: CPU and file types.
_MACH_O = b"\xcf\xfa\xed\xfe"
_MACH_O_MACHINES = {0x0100000C: "arm64", 0x01000007: "x86_64"}
_MACH_O_KINDS = {1: "object file", 2: "program", 6: _SHARED, 8: _SHARED}


# WebAssembly, version 1; what links, and what runs, begin alike.
_WEBASSEMBLY = b"\0asm\x01\0\0\0"


class Binary(NamedTuple):
    """What a file is. `format` is "ELF", "Mach-O" or "WebAssembly"; `None` stands for a file that is none of these."""

    format: str | None
    kind: str | None
    machine: str | None

    def __str__(self) -> str:
        named = {"ELF": "an ELF", "Mach-O": "a Mach-O", "WebAssembly": "a WebAssembly"}
        return f"{named[self.format]} {self.kind} for {self.machine}" if self.format else "no machine code"


def read(path: Path) -> Binary:
    """What the file at `path` is."""
    with path.open("rb") as file:
        return identify(file.read(HEADER_SIZE))


def identify(header: bytes) -> Binary:
    """What a file is that begins like this; whatever the bytes are, there is an answer."""
    if header.startswith(MAGIC) and len(header) >= 20 and header[4] in (1, 2) and header[5] in (1, 2):
        little = header[5] == 1
        kind, number = struct.unpack_from("<HH" if little else ">HH", header, 16)
        machine = _MACHINES.get((number, header[4] == 2, little), f"ELF machine {number}")
        return Binary("ELF", _KINDS.get(kind, f"file of type {kind}"), machine)
    if header.startswith(_MACH_O) and len(header) >= 16:
        cpu, _, kind = struct.unpack_from("<III", header, 4)
        return Binary(
            "Mach-O", _MACH_O_KINDS.get(kind, f"file of type {kind}"), _MACH_O_MACHINES.get(cpu, f"CPU type {cpu}")
        )
    if header.startswith(_WEBASSEMBLY):
        return Binary("WebAssembly", "object file", "wasm32")
    return Binary(None, None, None)


def machine(header: bytes) -> str | None:
    """The machine of an ELF shared library, or None when these are not the first bytes of one."""
    found = identify(header)
    return found.machine if (found.format, found.kind) == ("ELF", _SHARED) else None
