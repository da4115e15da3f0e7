# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/linux/kho/abi/memfd.h and vmalloc.h: memfd-v1 and memfd-v2, and the list of folios behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from khod.abi import pages
from khod.errors import FormatError
from khod.folio.units import MAX_ORDER, PAGE_SIZE, PHYS_BITS, PhysicalMemory

MAX_CHUNKS = 1 << 16
"""Pages of addresses: 32 million pages of records."""
DIRTY, UPTODATE = 1, 2

_V1 = Struct("<QQQQIHH")  # pos, size, nr_folios, folios
_V2 = Struct("<QQIIQQIHH")  # pos, size, seals, flags, nr_folios, folios
_CHUNK = Struct("<512Q")  # next, then addresses up to a zero
_FOLIO = Struct("<QQ")  # pfn and flags, index
_PFN_BITS = 52
PFN_MASK = (1 << _PFN_BITS) - 1


@dataclass(frozen=True, slots=True)
class Vmalloc:
    """``struct kho_vmalloc``: memory that need not be contiguous."""

    first: int
    total_pages: int
    flags: int
    order: int
    """Of each piece."""


@dataclass(frozen=True, slots=True)
class Memfd:
    """One memfd."""

    position: int
    size: int
    seals: int | None
    """None in memfd-v1, which does not say."""
    flags: int
    folios: int
    """How many."""
    records: Vmalloc


class Record(NamedTuple):
    """One folio of a memfd: its first frame, its flags, and the page of the file that it begins at."""

    pfn: int
    flags: int
    page: int


def decode(compatible: str, memory: PhysicalMemory, phys: int) -> Memfd:
    """The struct of a memfd at `phys`. Raises FormatError, also for a version that we do not know."""
    if (decoder := _DECODERS.get(compatible)) is None:
        raise FormatError(f"{compatible[:48]!r} is no layout of memfds that we read: these are {', '.join(_DECODERS)}")
    layout, make = decoder
    if phys >= 1 << PHYS_BITS:
        raise FormatError(f"memfd: {phys:#x} is no address")
    found = make(layout.unpack(pages.read(memory, phys, layout.size, "memfd")))
    if found.records.order > MAX_ORDER or found.folios * _FOLIO.size > found.records.total_pages * PAGE_SIZE:
        raise FormatError(f"memfd: {found.folios} folios in {found.records.total_pages} pages of order {found.records.order}")
    return found


def folios(memory: PhysicalMemory, memfd: Memfd) -> Iterator[Record]:
    """Its folios, in the order of the file. Raises FormatError."""
    for page in record_pages(memory, memfd):
        for word, index in _FOLIO.iter_unpack(page):
            yield Record(word & PFN_MASK, word >> _PFN_BITS, index)


def record_pages(memory: PhysicalMemory, memfd: Memfd) -> Iterator[bytes]:
    """The records themselves, a page of them at a time: of each, a word of pfn and flags, and the index. Raises FormatError."""
    left = memfd.folios * _FOLIO.size
    for piece, chunk in storage(memory, memfd.records):
        if chunk:
            continue
        for start in range(piece, piece + (PAGE_SIZE << memfd.records.order), PAGE_SIZE):
            if left == 0:
                return
            yield (page := pages.read(memory, start, PAGE_SIZE, "memfd: records")[:left])
            left -= len(page)
    if left:
        raise FormatError(f"memfd: {left // _FOLIO.size} of its {memfd.folios} folios have no record")


def storage(memory: PhysicalMemory, area: Vmalloc) -> Iterator[tuple[int, bool]]:
    """Addresses of the pieces of an area, as many as it has pages for, and of the pages that list them, before what they list:
    those are True. Raises FormatError."""
    visited = pages.Visited(memory, "vmalloc", MAX_CHUNKS)
    wanted, at = -(-area.total_pages // (1 << area.order)), area.first
    seen: set[int] = set()
    while at and wanted > 0:
        page = visited.page(at)
        yield at, True
        at, *addresses = _CHUNK.unpack(page)
        for phys in addresses:
            if phys == 0 or wanted == 0:
                break
            if phys % (PAGE_SIZE << area.order) or phys >= 1 << PHYS_BITS or phys in seen:
                raise FormatError(
                    f"vmalloc: {phys:#x} is no address of a piece of order {area.order}, or one for the second time"
                )
            seen.add(phys)
            yield phys, False
            wanted -= 1


def _v1(fields: tuple[int, ...]) -> Memfd:
    position, size, count, *records = fields
    return Memfd(position, size, None, 0, count, Vmalloc(*records))


def _v2(fields: tuple[int, ...]) -> Memfd:
    position, size, seals, flags, count, *records = fields
    return Memfd(position, size, seals, flags, count, Vmalloc(*records))


_DECODERS: dict[str, tuple[Struct, Callable[[tuple[int, ...]], Memfd]]] = {"memfd-v1": (_V1, _v1), "memfd-v2": (_V2, _v2)}
