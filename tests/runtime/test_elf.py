"""Whatever a file holds, the reader says what it is, and never guesses."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from saevit_tvm.runtime import elf

ARM_LIBRARY = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 183)
MAC_OBJECT = struct.pack("<IIII", 0xFEEDFACF, 0x0100000C, 0, 1)


@given(st.binary(max_size=100))
@example(b"")
@example(b"\x7fELF")
@example(b"\xcf\xfa\xed\xfe")
def test_any_bytes_get_an_answer(header: bytes) -> None:
    found = elf.identify(header)
    assert (found.format is None) == (str(found) == "no machine code")
    assert elf.machine(header) is None or found.kind == "shared library"


@given(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary())
def test_every_elf_header_is_read_in_its_own_byte_order(
    width: int, order: int, kind: int, number: int, rest: bytes
) -> None:
    header = elf.MAGIC + bytes([width, order]) + bytes(10) + struct.pack("<HH" if order == 1 else ">HH", kind, number)
    found = elf.identify(header + rest)
    assert found.format == "ELF"
    assert (found.machine == "aarch64") == ((width, order, number) == (2, 1, 183))
    assert (found.kind == "shared library") == (kind == 3)


@given(st.integers(0, 19))
def test_the_beginning_of_a_header_is_none(length: int) -> None:
    assert elf.identify(ARM_LIBRARY[:length]) == (None, None, None)
    assert elf.identify(MAC_OBJECT[: length - 4]) == (None, None, None)


def test_what_is_there_is_named() -> None:
    assert str(elf.identify(ARM_LIBRARY)) == "an ELF shared library for aarch64"
    assert elf.machine(ARM_LIBRARY) == "aarch64"
    assert elf.identify(MAC_OBJECT) == ("Mach-O", "object file", "arm64")
    assert elf.read(Path(sys.executable)).format == "ELF"
