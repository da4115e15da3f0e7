# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own record of what it preserves, inside simulated physical memory: all that its successor will know.

Bytes of any length are a *blob*: a chain of folios, each beginning with the address of the next, its own order, and how many
bytes of the blob it holds. Each file's list of folios is a blob of frame numbers, made when the file is preserved; the root
is a blob of JSON, made at the jump, and its address is the one word that is handed over. Nothing here knows of khod's map.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from khod.folio.units import PAGE_SHIFT, Folio
from khod.simulated.buddy import Pfns
from khod.simulated.pages import Pages
from khod.simulated.ram import Ram

_LINK = struct.Struct("<8sQQQ")
_MAGIC = b"SIMBLOB\0"
_MAX_ORDER = 9


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A preserved file."""

    token: int
    handler: str
    """Compatible string of the handler that wrote it."""
    size: int
    order: int
    seals: int
    position: int
    folios: int
    """Address of the blob with its frame numbers; 0 for a file that has none."""
    kind: str = "memfd"
    private: bool = False
    """Of a guest_memfd: nobody but the guest may look into it."""
    inside: str = ""
    """What a file without frames has inside."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session, in the order of creation; `name` in hexadecimal, for names are arbitrary bytes."""

    name: str
    files: list[FileRecord] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Root:
    """Everything that crosses."""

    kho: str
    luo: str
    release: str
    kexec_count: int
    sessions: list[SessionRecord]


def write_blob(pages: Pages, contents: bytes) -> tuple[int, list[Folio]]:
    """Store bytes in new folios outside scratch; the blob's address, and its folios. Raises OSError(ENOMEM)."""
    order = min(_MAX_ORDER, max(0, (len(contents) + _LINK.size - 1).bit_length() - PAGE_SHIFT))
    heads, room = _take(pages, len(contents), order)
    for i, head in enumerate(heads):
        part = contents[i * room : (i + 1) * room]
        following = heads[i + 1] << PAGE_SHIFT if i + 1 < len(heads) else 0
        pages.ram.write(head << PAGE_SHIFT, _LINK.pack(_MAGIC, following, len(part), _order(room)) + part)
    return heads[0] << PAGE_SHIFT, [Folio(head, _order(room)) for head in heads]


def _take(pages: Pages, size: int, order: int) -> tuple[list[int], int]:
    """Folios for a blob, of `order` or, where memory is fragmented, of single pages; and what each has room for."""
    for attempt in (order, 0):
        room = (1 << (attempt + PAGE_SHIFT)) - _LINK.size
        try:
            return pages.take(attempt, max(1, -(-size // room))).tolist(), room
        except OSError:
            if attempt == 0:
                raise
    raise AssertionError("the loop returns or raises")


def _order(room: int) -> int:
    return (room + _LINK.size).bit_length() - 1 - PAGE_SHIFT


def read_blob(ram: Ram, phys: int) -> tuple[bytes, list[Folio]]:
    """The bytes of a blob, and its folios. A kernel trusts its predecessor: raises ValueError if it should not have."""
    parts, folios = [], []
    while phys:
        magic, following, length, order = _LINK.unpack(ram.read(phys, _LINK.size))
        if magic != _MAGIC or order > _MAX_ORDER:
            raise ValueError(f"no record of a kernel at {phys:#x}")
        parts.append(ram.read(phys + _LINK.size, length))
        folios.append(Folio(phys >> PAGE_SHIFT, order))
        phys = following
    return b"".join(parts), folios


def free_blob(pages: Pages, folios: list[Folio]) -> None:
    """Give a blob's folios back."""
    if folios:
        pages.give_back(np.array([folio.pfn for folio in folios], dtype=np.int64), folios[0].order)


def write_root(pages: Pages, root: Root) -> int:
    """Store the root; its address."""
    return write_blob(pages, json.dumps(asdict(root)).encode())[0]


def read_root(ram: Ram, phys: int) -> tuple[Root, list[Folio]]:
    """The root that a previous kernel left at `phys`, and its folios."""
    raw, folios = read_blob(ram, phys)
    value = json.loads(raw)
    sessions = [SessionRecord(s["name"], [FileRecord(**file) for file in s["files"]]) for s in value.pop("sessions")]
    return Root(**value, sessions=sessions), folios


def frames_of(ram: Ram, file: FileRecord) -> Pfns:
    """The first frames of a preserved file's folios."""
    return np.frombuffer(read_blob(ram, file.folios)[0], dtype="<i8").astype(np.int64)


def spared(ram: Ram, phys: int) -> Iterator[tuple[Pfns, int]]:
    """All folios that were preserved, those of the record included, as (first frames, order)."""
    root, own = read_root(ram, phys)
    yield _heads(own)
    for session in root.sessions:
        for file in session.files:
            if not file.folios:
                continue
            listed, folios = read_blob(ram, file.folios)
            yield _heads(folios)
            yield np.frombuffer(listed, dtype="<i8").astype(np.int64), file.order


def _heads(folios: list[Folio]) -> tuple[Pfns, int]:
    return np.array([folio.pfn for folio in folios], dtype=np.int64), folios[0].order
