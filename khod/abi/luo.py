# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/linux/kho/abi/luo.h and block.h, luo-v5: what the live update orchestrator leaves to the next kernel.

A header leads to two lists of blocks, of sessions and of what files have in common (FLBs); each session to a list of its files.
Blocks are zero until reboot(2), so a running kernel's header leads nowhere; in the next kernel they live until the device is
opened for the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from khod.abi import formats, pages
from khod.errors import FormatError
from khod.folio.units import PAGE_SIZE, PhysicalMemory

VERSION = "luo-v5"
MAX_BLOCKS = 10_000
"""Of one list, as the kernel has it."""
MAX_NAME = 128
"""Bytes of a composite name of a format."""

_BLOCK = Struct("<QQ")  # next, count
_FIELDS = Struct("<QQQ")  # liveupdate_num, sessions_pa, flbs_pa
_SESSION = Struct("<64sQQ")  # name, files, file_count
FILE = Struct("<48sQQ")
"""compatible, data, token"""
_FLB = Struct("<48sQQ")  # name, data, count


@dataclass(frozen=True, slots=True)
class Header:
    """The blob ``LUO``."""

    format: formats.Format
    number: int
    """Of this live update; the first has 1."""
    sessions: int
    """Address of the first block, 0 before reboot(2)."""
    flbs: int


@dataclass(frozen=True, slots=True)
class Session:
    """One session."""

    name: bytes
    files: int
    """Address of the first block of its files; 0 for none."""
    count: int


@dataclass(frozen=True, slots=True)
class File:
    """One file of a session."""

    compatible: formats.Format
    data: int
    """What its handler made of it: for a memfd the address of its struct."""
    token: int


@dataclass(frozen=True, slots=True)
class Flb:
    """Something that files of a handler share."""

    compatible: formats.Format
    data: int
    users: int


def decode(blob: bytes) -> Header:
    """Raises FormatError, also for a version that is laid out in another way."""
    name, null, _ = blob[:MAX_NAME].partition(b"\0")
    if not null:
        raise FormatError(f"LUO: it begins with no name of a format: {blob[:16]!r}")
    found = formats.parse(name.decode("ascii", "replace"))
    if found.base != VERSION:
        raise FormatError(f"LUO: it is of {found}, and {VERSION} is what we read")
    at = -(-(len(name) + 1) // 8) * 8  # the name has a field of whole words
    if len(blob) < at + _FIELDS.size:
        raise FormatError(f"LUO: {len(blob)} bytes, and it has {at + _FIELDS.size}")
    return Header(found, *_FIELDS.unpack_from(blob, at))


def sessions(memory: PhysicalMemory, header: Header) -> Iterator[Session]:
    """Every session, in the order of freezing. Raises FormatError."""
    for raw, files, count in _entries(memory, header.sessions, _SESSION, "sessions"):
        name = raw.partition(b"\0")[0]
        if not name or len(name) == len(raw):
            raise FormatError(f"LUO: a session's name does not end, or is none: {raw[:16]!r}")
        if bool(files) != bool(count):
            raise FormatError(f"LUO: session {name!r} has {count} files at {files:#x}")
        yield Session(name, files, count)


def files(memory: PhysicalMemory, session: Session) -> Iterator[File]:
    """The files of a session, as many as it says. Raises FormatError."""
    found = 0
    for raw, data, token in _entries(memory, session.files, FILE, f"files of {session.name!r}"):
        found += 1
        if found > session.count:
            raise FormatError(f"LUO: session {session.name!r} has more than its {session.count} files")
        yield file_of(raw, data, token)
    if found != session.count:
        raise FormatError(f"LUO: session {session.name!r} has {found} of its {session.count} files")


def file_of(raw: bytes, data: int, token: int) -> File:
    """A file by the fields of its entry. Raises FormatError."""
    return File(_name(raw), data, token)


def flbs(memory: PhysicalMemory, header: Header) -> Iterator[Flb]:
    """What files share: one page, whose first word counts pages. Raises FormatError."""
    if not header.flbs:
        return
    pages.check_page(header.flbs, "LUO: FLBs")
    page = pages.read(memory, header.flbs, PAGE_SIZE, "LUO: FLBs")
    size, count = _BLOCK.unpack_from(page)
    if size > 1 or count > (PAGE_SIZE - _BLOCK.size) // _FLB.size:
        raise FormatError(f"LUO: {count} FLBs in {size} pages")
    for number in range(count):
        raw, data, users = _FLB.unpack_from(page, _BLOCK.size + number * _FLB.size)
        yield Flb(_name(raw), data, users)


def _name(raw: bytes) -> formats.Format:
    text, null, rest = raw.partition(b"\0")
    if not null or rest.strip(b"\0"):
        raise FormatError(f"LUO: a name of a format does not end: {raw[:24]!r}")
    return formats.parse(text.decode("ascii", "replace"))


def _entries(memory: PhysicalMemory, first: int, layout: Struct, what: str) -> Iterator[tuple[bytes, int, int]]:
    visited = pages.Visited(memory, f"LUO: {what}", MAX_BLOCKS)
    capacity = (PAGE_SIZE - _BLOCK.size) // layout.size
    at = first
    while at:
        page = visited.page(at)
        at, count = _BLOCK.unpack_from(page)
        if not 0 < count <= capacity:
            raise FormatError(f"LUO: {what}: a block of {count} entries, of at most {capacity}")
        for number in range(count):
            raw, one, two = layout.unpack_from(page, _BLOCK.size + number * layout.size)
            yield bytes(raw), int(one), int(two)
