"""What compiled CUDA code holds, read from its bytes: no compiler, no driver.

A fat binary is a header and entries one after the other, each PTX or a *cubin*: an ELF file with a section of code
for every kernel. Its `.nv.info` sections say what a kernel takes of the GPU. Whatever the bytes are, there is an
answer or a FatbinError.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = struct.pack("<I", 0xBA55ED50)
ELF_MAGIC = b"\x7fELF"
CUDA_MACHINE = 190  # e_machine

_HEADER = struct.Struct("<IHHQ")  # magic, version, size of the header, size of the entries
_ENTRY = struct.Struct("<HHIQIIII")  # kind, version, size of the header, size, compressed size, ..., ..., architecture
_PTX, _CUBIN = 1, 2
_COMPRESSED = struct.Struct("<Q")
_COMPRESSED_AT = 56  # the size that an entry has when it is unpacked, 0 where it never was packed

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_REGISTERS, _FRAME = 0x2F, 0x11  # attributes of .nv.info: a symbol and a number each
_SIZED = 4  # the format of attributes that state their size; others have two bytes


class FatbinError(ValueError):
    """The bytes are not what they should be."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: 32-bit registers a thread, bytes of shared memory a block, bytes of stack a thread."""

    registers: int
    shared_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class Entry:
    """One program of a fat binary, for one architecture."""

    kind: str  # "cubin" or "ptx"
    architecture: int
    code: bytes
    compressed: bool = False

    def kernels(self) -> set[str]:
        if self.compressed:
            raise FatbinError("an entry is compressed and cannot be read")
        return set(resources(self.code)) if self.kind == "cubin" else ptx_kernels(self.code)


def find(data: bytes) -> Iterator[list[Entry]]:
    """Every fat binary in a file."""
    at = data.find(MAGIC)
    while at >= 0:
        yield entries(data[at:])
        at = data.find(MAGIC, at + len(MAGIC))


def entries(data: bytes) -> list[Entry]:
    """The programs of the fat binary that the bytes begin with."""
    magic, _version, header, size = _unpack(_HEADER, data, 0)
    if struct.pack("<I", magic) != MAGIC or header < _HEADER.size or header + size > len(data):
        raise FatbinError("there is no whole fat binary")
    found, at, end = [], header, header + size
    while at < end:
        kind, _, skip, length, _, _, _, architecture = _unpack(_ENTRY, data, at)
        if skip < _COMPRESSED_AT + _COMPRESSED.size or at + skip + length > end:
            raise FatbinError(f"the entry at byte {at} goes beyond the end")
        if kind not in (_PTX, _CUBIN):
            raise FatbinError(f"the entry at byte {at} is of unknown kind {kind}")
        code = data[at + skip : at + skip + length]
        (unpacked,) = _unpack(_COMPRESSED, data, at + _COMPRESSED_AT)
        found.append(Entry("ptx" if kind == _PTX else "cubin", architecture, code, bool(unpacked)))
        at += skip + length
    return found


def ptx_kernels(code: bytes) -> set[str]:
    """The kernels that a PTX program offers."""
    return {name.decode() for name in re.findall(rb"\.entry\s+([A-Za-z_$][\w$]*)", code)}


def resources(cubin: bytes) -> dict[str, Resources]:
    """What every kernel of a cubin takes."""
    sections = _sections(cubin)
    symbols = _symbols(sections)
    numbers = {
        attribute: _numbers(sections.get(".nv.info", (0, b"", 0))[1], attribute) for attribute in (_REGISTERS, _FRAME)
    }
    kernels = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    found = {}
    for kernel in kernels:
        index = symbols.get(kernel)
        if index is None or index not in numbers[_REGISTERS]:
            raise FatbinError(f"nothing is said of the registers of '{kernel}'")
        shared = sections.get(f".nv.shared.{kernel}", (0, b"", 0))[2]
        found[kernel] = Resources(numbers[_REGISTERS][index], shared, numbers[_FRAME].get(index, 0))
    return found


def _sections(cubin: bytes) -> dict[str, tuple[int, bytes, int]]:
    """Type, content and size of every named section; one without content in the file has a size all the same."""
    if cubin[:4] != ELF_MAGIC or len(cubin) < 64 or cubin[4:6] != b"\x02\x01":
        raise FatbinError("the program is no 64-bit ELF file")
    if struct.unpack_from("<H", cubin, 18)[0] != CUDA_MACHINE:
        raise FatbinError("the ELF file is not for a GPU of NVIDIA")
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    if size != _SECTION.size or names_at >= count:
        raise FatbinError("the sections of the ELF file cannot be read")
    headers = [_unpack(_SECTION, cubin, start + index * size) for index in range(count)]
    names = _content(cubin, headers[names_at])
    return {
        _string(names, header[0]): (header[1], _content(cubin, header), header[5]) for header in headers if header[1]
    }


_NO_BITS = 8


def _content(data: bytes, header: tuple[int, ...]) -> bytes:
    kind, offset, size = header[1], header[4], header[5]
    if kind == _NO_BITS:
        return b""
    if offset + size > len(data):
        raise FatbinError("a section goes beyond the end of the ELF file")
    return data[offset : offset + size]


def _symbols(sections: dict[str, tuple[int, bytes, int]]) -> dict[str, int]:
    """The number of every symbol."""
    names = sections.get(".strtab", (0, b"", 0))[1]
    table = sections.get(".symtab", (0, b"", 0))[1]
    whole = len(table) - len(table) % _SYMBOL.size
    return {_string(names, symbol[0]): index for index, symbol in enumerate(_SYMBOL.iter_unpack(table[:whole]))}


def _numbers(info: bytes, wanted: int) -> dict[int, int]:
    """What an attribute says of each symbol."""
    found, at = {}, 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _SIZED:
            continue
        if attribute == wanted and size >= 8 and at + 8 <= len(info):
            symbol, value = struct.unpack_from("<II", info, at)
            found[symbol] = value
        at += size
    return found


def _string(names: bytes, at: int) -> str:
    return names[at : names.find(b"\0", at)].decode("utf-8", "replace")


def _unpack(layout: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return layout.unpack_from(data, at)
    except struct.error as error:
        raise FatbinError(f"there is nothing to be read at byte {at}") from error
