"""The few bytes of an ELF header that tell for which machine a library was linked.

They are read before dlopen sees the file, because dlopen's own message names neither machine.
"""

from __future__ import annotations

import struct

MAGIC = b"\x7fELF"
HEADER_SIZE = 20
SHARED_OBJECT = 3

# (e_machine, 64 bit, little endian) -> the name that platform.machine() has for it.
_MACHINES = {
    (3, False, True): "i686",
    (40, False, True): "armv7l",
    (62, True, True): "x86_64",
    (183, True, True): "aarch64",
    (243, True, True): "riscv64",
}


def machine(header: bytes) -> str | None:
    """The machine of a shared library, or None when these are not the first bytes of one."""
    if len(header) < HEADER_SIZE or not header.startswith(MAGIC):
        return None
    little = header[5] == 1
    kind, number = struct.unpack_from("<HH" if little else ">HH", header, 16)
    if kind != SHARED_OBJECT:
        return None
    return _MACHINES.get((number, header[4] == 2, little), f"ELF machine {number}")
