# SPDX-License-Identifier: LGPL-2.1-or-later
"""ELF files of 64 bits, little-endian (include/uapi/linux/elf.h): an uncompressed kernel, and what a program needs to be run.
Nothing in one is believed before it was compared with the file's length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from khod.errors import FormatError

MAGIC = b"\x7fELF"
MACHINES = {62: "x86-64", 183: "arm64", 243: "riscv"}
"""e_machine of what Linux runs on and KHO may be built for, and what we call it."""
MAX_HEADERS = 4096
"""More of either kind than this is no kernel."""

_IDENT_64_LSB = b"\x02\x01\x01"
_EHDR = Struct("<16sHHIQQQIHHHHHH")
_PHDR = Struct("<IIQQQQQQ")
_SHDR = Struct("<IIQQQQIIQQ")
_DYN = Struct("<QQ")
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_SHT_NOBITS = 8
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 15, 29
MAX_DYNAMIC = 4096
"""More entries than this has no dynamic section."""


class Extent(NamedTuple):
    """A piece of the file."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Elf:
    """What is wanted of it."""

    machine: str
    """One of `MACHINES`, or the number."""
    segments: tuple[Extent, ...]
    """What is loaded, in the order of the program headers."""
    sections: dict[str, Extent]
    """By name; those that have bytes in the file. Empty in an image without section headers."""


def parse(data: bytes) -> Elf:
    """Raises FormatError for anything that is no such file, or whose headers lead out of it."""
    if len(data) < _EHDR.size or not data.startswith(MAGIC):
        raise FormatError("it is no ELF file")
    ident, _, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = _EHDR.unpack_from(data)
    if ident[4:7] != _IDENT_64_LSB:
        raise FormatError("it is an ELF file, but none of 64 bits and little-endian")
    segments = []
    for header in _table(data, phoff, phentsize, phnum, _PHDR, "program"):
        if header[0] == _PT_LOAD:
            segments.append(_extent(data, header[2], header[5], "segment"))
    if not segments:
        raise FormatError("it is an ELF file in which nothing is to be loaded")
    headers = list(_table(data, shoff, shentsize, shnum, _SHDR, "section"))
    return Elf(MACHINES.get(machine, str(machine)), tuple(segments), dict(_named(data, headers, shstrndx)))


@dataclass(frozen=True, slots=True)
class Linkage:
    """What a program or library needs to be run."""

    interpreter: Extent | None
    """Where in the file the path of its dynamic loader is, with its NUL; None for a library, or a static program."""
    needed: tuple[str, ...]
    """DT_NEEDED, in order."""
    search: tuple[str, ...]
    """DT_RUNPATH, or DT_RPATH where there is none: directories, "$ORIGIN" not replaced."""


def linkage(data: bytes) -> Linkage:
    """Raises FormatError for anything that is no ELF file, or whose headers lead out of it."""
    if len(data) < _EHDR.size or not data.startswith(MAGIC):
        raise FormatError("it is no ELF file")
    ident, _, _, _, _, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack_from(data)
    if ident[4:7] != _IDENT_64_LSB:
        raise FormatError("it is an ELF file, but none of 64 bits and little-endian")
    loads, interpreter, dynamic = [], None, None
    for kind, _, offset, address, _, size, *_ in _table(data, phoff, phentsize, phnum, _PHDR, "program"):
        extent = _extent(data, offset, size, "segment")
        if kind == _PT_LOAD:
            loads.append((address, extent))
        elif kind == _PT_INTERP:
            interpreter = extent
        elif kind == _PT_DYNAMIC:
            dynamic = extent
    if interpreter is not None and (not interpreter.size or data[interpreter.offset + interpreter.size - 1]):
        raise FormatError("the path of its loader does not end")
    entries = [] if dynamic is None else list(_dynamic(data, dynamic))
    tables = [value for tag, value in entries if tag == _DT_STRTAB]
    strings = _at(loads, tables[0]) if tables else 0

    def named(wanted: int) -> list[str]:
        return [_string(data, strings + value) for tag, value in entries if tag == wanted]

    search = named(_DT_RUNPATH) or named(_DT_RPATH)
    return Linkage(interpreter, tuple(named(_DT_NEEDED)), tuple(part for text in search for part in text.split(":") if part))


def _dynamic(data: bytes, extent: Extent) -> Iterator[tuple[int, int]]:
    if extent.size // _DYN.size > MAX_DYNAMIC:
        raise FormatError(f"its dynamic section makes no sense: {extent.size} bytes")
    for offset in range(extent.offset, extent.offset + extent.size - _DYN.size + 1, _DYN.size):
        tag, value = _DYN.unpack_from(data, offset)
        if tag == _DT_NULL:
            return
        yield tag, value


def _at(loads: list[tuple[int, Extent]], address: int) -> int:
    for start, extent in loads:
        if start <= address < start + extent.size:
            return extent.offset + address - start
    raise FormatError(f"its dynamic strings at {address:#x} are in no segment")


def _string(data: bytes, start: int) -> str:
    end = data.find(b"\0", start, start + 4096) if start < len(data) else -1
    if end < 0:
        raise FormatError(f"a dynamic string at {start} does not end")
    return data[start:end].decode("utf-8", "surrogateescape")


def _table(data: bytes, offset: int, entry: int, count: int, layout: Struct, what: str) -> Iterator[tuple[int, ...]]:
    if count == 0:
        return
    if entry != layout.size or count > MAX_HEADERS:
        raise FormatError(f"its {what} headers make no sense: {count} of {entry} bytes")
    _extent(data, offset, entry * count, f"{what} headers")
    for number in range(count):
        yield layout.unpack_from(data, offset + number * entry)


def _named(data: bytes, headers: list[tuple[int, ...]], names: int) -> Iterator[tuple[str, Extent]]:
    if not headers:
        return
    if names >= len(headers):
        raise FormatError(f"its section {names}, of the names of sections, is none of {len(headers)}")
    table = _extent(data, headers[names][4], headers[names][5], "names of sections")
    for header in headers:
        if header[1] in (0, _SHT_NOBITS):
            continue
        start = table.offset + header[0]
        if header[0] >= table.size:
            raise FormatError(f"the name of a section lies at {header[0]}, beyond the {table.size} bytes of names")
        end = data.find(b"\0", start, table.offset + table.size)
        name = data[start : end if end >= 0 else table.offset + table.size].decode("ascii", "replace")
        yield name, _extent(data, header[4], header[5], f"section {name}")


def _extent(data: bytes, offset: int, size: int, what: str) -> Extent:
    if offset + size > len(data):
        raise FormatError(f"its {what}: {size} bytes at {offset} lie beyond the end, at {len(data)}")
    return Extent(offset, size)
