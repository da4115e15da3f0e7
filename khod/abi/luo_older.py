# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/linux/kho/abi/luo.h before luo-v5, which only kernels of 6.19 to 7.1, and some between releases, write.

luo-v1 is a tree with two children and luo-v2 one with the address of a header; from luo-v3 on that header is the blob. Sessions
are one array up to luo-v3 and a list of blocks in luo-v4; the files of a session are one array in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from khod.abi import fdt_door, formats, luo, pages
from khod.abi.kexec_handover import number, string
from khod.errors import FormatError
from khod.folio.units import PAGE_SIZE, PhysicalMemory

VERSIONS = ("luo-v1", "luo-v2", "luo-v3", "luo-v4")
MAX_SESSIONS = (16 * PAGE_SIZE - 8) // 80
"""Of one array: 16 pages."""
MAX_FILES = 2 * PAGE_SIZE // 64
"""Of one session: 2 pages."""

_HEADER = Struct("<QQQ")  # liveupdate_num, sessions_pa, flbs_pa
_COUNT = Struct("<Q")
_SESSION = Struct("<64sQQ")  # name, files, count
_OLDEST_SESSION = Struct("<64sQQQ")  # name, files, pgcnt, count
_SESSIONS, _OLDEST_SESSIONS = "luo-session-v2", "luo-session-v1"
"""Compatible of the child: the older one has longer entries."""


@dataclass(frozen=True, slots=True)
class Session:
    """One session, with its files."""

    name: bytes
    files: tuple[luo.File, ...]


@dataclass(frozen=True, slots=True)
class Older:
    """What one of these versions hands over."""

    format: formats.Format
    number: int
    sessions: tuple[Session, ...]
    flbs: tuple[luo.Flb, ...]


def decode(memory: PhysicalMemory, blob: bytes) -> Older:
    """The blob ``LUO`` and what it leads to. Raises FormatError, also for a version that is not one of these."""
    if blob.startswith(b"\xd0\x0d\xfe\xed"):
        root = fdt_door.unflatten(blob[: fdt_door.blob_size(blob)])
        version = formats.parse(string(root, "compatible"))
        if version.base == "luo-v1":
            return _v1(memory, version, root)
        if version.base == "luo-v2":
            header = pages.read(memory, _address(number(root, "luo-abi-header")), _HEADER.size, "LUO: header")
            return _headed(memory, version, header)
    else:
        name, null, _ = blob[: luo.MAX_NAME].partition(b"\0")
        version = formats.parse(name.decode("ascii", "replace")) if null else formats.Format("none-v0")
        if version.base in ("luo-v3", "luo-v4"):
            return _headed(memory, version, blob[-(-(len(name) + 1) // 8) * 8 :])
    raise FormatError(f"LUO: it is of {version}; we read {', '.join((*VERSIONS, luo.VERSION))}")


def _v1(memory: PhysicalMemory, version: formats.Format, root: fdt_door.RawNode) -> Older:
    children = {child.name: child for child in root.children}
    sessions: tuple[Session, ...] = ()
    flbs: tuple[luo.Flb, ...] = ()
    if child := children.get("luo-session"):
        kind = string(child, "compatible")
        if kind not in (_SESSIONS, _OLDEST_SESSIONS):
            raise FormatError(f"LUO: its sessions are of {kind[:48]!r}; we read {_SESSIONS} and {_OLDEST_SESSIONS}")
        layout = _SESSION if kind == _SESSIONS else _OLDEST_SESSION
        sessions = tuple(_array(memory, number(child, "luo-session-header"), layout))
    if child := children.get("luo-flb"):
        if (kind := string(child, "compatible")) != "luo-flb-v1":
            raise FormatError(f"LUO: its FLBs are of {kind[:48]!r}, and luo-flb-v1 is what we read")
        flbs = _flbs(memory, version, number(child, "luo-flb-header"))
    return Older(version, number(root, "liveupdate-number"), sessions, flbs)


def _headed(memory: PhysicalMemory, version: formats.Format, header: bytes) -> Older:
    if len(header) < _HEADER.size:
        raise FormatError(f"LUO: a header of {len(header)} bytes, and it has {_HEADER.size}")
    count, sessions, flbs = _HEADER.unpack_from(header)
    if version.base == "luo-v4":
        rows: Iterator[Session] = _blocks(memory, version, count, sessions)
    else:
        rows = _array(memory, sessions, _SESSION)
    return Older(version, count, tuple(rows), _flbs(memory, version, flbs))


def _array(memory: PhysicalMemory, at: int, layout: Struct) -> Iterator[Session]:
    if not at:
        return
    (count,) = _COUNT.unpack(pages.read(memory, _address(at), _COUNT.size, "LUO: sessions"))
    if count > MAX_SESSIONS:
        raise FormatError(f"LUO: {count} sessions, of at most {MAX_SESSIONS}")
    data = pages.read(memory, at + _COUNT.size, count * layout.size, "LUO: sessions")
    for fields in layout.iter_unpack(data):
        yield _session(memory, fields[0], fields[1], fields[-1])


def _blocks(memory: PhysicalMemory, version: formats.Format, number: int, at: int) -> Iterator[Session]:
    """As in luo-v5."""
    for one in luo.sessions(memory, luo.Header(version, number, at, 0)):
        yield Session(one.name, _files(memory, one.files, one.count))


def _session(memory: PhysicalMemory, raw: bytes, files: int, count: int) -> Session:
    name = raw.partition(b"\0")[0]
    if not name or len(name) == len(raw):
        raise FormatError(f"LUO: a session's name does not end, or is none: {raw[:16]!r}")
    return Session(name, _files(memory, files, count))


def _files(memory: PhysicalMemory, at: int, count: int) -> tuple[luo.File, ...]:
    if count > MAX_FILES or bool(count) > bool(at):
        raise FormatError(f"LUO: {count} files at {at:#x}, of at most {MAX_FILES}")
    if not count:
        return ()
    data = pages.read(memory, _address(at), count * luo.FILE.size, "LUO: files")
    return tuple(luo.file_of(*fields) for fields in luo.FILE.iter_unpack(data))


def _flbs(memory: PhysicalMemory, version: formats.Format, at: int) -> tuple[luo.Flb, ...]:
    return tuple(luo.flbs(memory, luo.Header(version, 0, 0, _address(at)))) if at else ()


def _address(phys: int) -> int:
    pages.check_page(phys, "LUO")
    return phys
