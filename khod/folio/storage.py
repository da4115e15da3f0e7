# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory that a map itself lies in, and the walk along its list of chunks: what both readers have in common.

Each page is read once, whole, and only while the number of pages stays within what the tree announced; so no map, whatever
is in it, costs more reads than that, nor more memory. Integers only; the restore path uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from khod.folio.errors import (
    ChunkCycle,
    ChunkInScratch,
    ChunkNotFull,
    ChunkNotRam,
    ChunkUnaligned,
    DigestMismatch,
    ElementCount,
    OrdersNotAscending,
    OrderTooHigh,
    PagesWithoutMap,
    StorageOverlap,
    TooManyPages,
    Unreadable,
)
from khod.folio.ground import Ground
from khod.folio.layout import BITMAP_BYTES, CHUNK_ELEMENTS, HEADER
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, PhysicalMemory

_OFFSET = PAGE_SIZE - 1


class Chunk(NamedTuple):
    """A chunk whose header has been accepted."""

    address: int
    order: int
    num_elms: int
    page: bytes


class Storage:
    """The pages of one map: reads, counts and claims them."""

    def __init__(self, memory: PhysicalMemory, ground: Ground, pages: int) -> None:
        self._memory = memory
        self._ground = ground
        self._budget = pages
        self._pages: dict[int, bytes] = {}
        self._chunks: set[int] = set()
        self._claimed: set[int] = set()  # every address at which 512 bytes are in use
        self._digest = hashlib.sha256()

    def chunk(self, address: int, named_by: int) -> bytes:
        """The page of the chunk at `address`, a pointer that stands in the chunk at `named_by` (0: in the tree)."""
        if address & _OFFSET:
            raise ChunkUnaligned(named_by, None, address)
        pfn = address >> PAGE_SHIFT
        if self._ground.hole(pfn, pfn + 1) is not None:
            raise ChunkNotRam(named_by, None, address)
        if not self._ground.allows(pfn, pfn + 1):
            raise ChunkInScratch(named_by, None, address)
        if address in self._chunks:
            raise ChunkCycle(named_by, None, address)
        units = range(address, address + PAGE_SIZE, BITMAP_BYTES)
        if not self._claimed.isdisjoint(units):
            raise StorageOverlap(named_by, None, address)
        self._chunks.add(address)
        self._claimed.update(units)
        page = self._page(address, named_by, None)
        self._digest.update(page)
        return page

    def overlapping(self, bitmaps: Sequence[int]) -> int | None:
        """Which of `bitmaps` is the first to overlap a chunk, an earlier bitmap or an earlier of these. They are addresses;
        one that is not aligned overlaps nothing here, being wrong already."""
        if self._claimed.isdisjoint(bitmaps) and len(set(bitmaps)) == len(bitmaps):
            return None
        seen = set(self._claimed)
        for i, address in enumerate(bitmaps):
            if address in seen:
                return i
            seen.add(address)
        return None

    def bitmaps(self, chunk: int, addresses: tuple[int, ...]) -> list[bytes]:
        """The bitmaps of one chunk, in pieces of one or several; their addresses have been accepted."""
        self._claimed.update(addresses)
        pieces = []
        at = 0
        while at < len(addresses):
            address = addresses[at]
            offset = address & _OFFSET
            page = self._pages.get(address - offset) or self._page(address - offset, chunk, at)
            # Mostly a page is filled from here to its end: one piece then, and no copy if it is the whole page.
            run = addresses[at : at + (PAGE_SIZE - offset) // BITMAP_BYTES]
            rest = range(address, address + len(run) * BITMAP_BYTES, BITMAP_BYTES)
            taken = len(run) if run == tuple(rest) else 1
            piece = page[offset : offset + taken * BITMAP_BYTES]
            self._digest.update(piece)
            pieces.append(piece)
            at += taken
        return pieces

    def check_digest(self, announced: bytes) -> None:
        """Compare what was read, in the order in which it was read, with what was announced. Raises DigestMismatch."""
        found = self._digest.digest()
        if found != announced:
            raise DigestMismatch(found, bytes(announced))

    def _page(self, address: int, chunk: int, element: int | None) -> bytes:
        if len(self._pages) >= self._budget:
            raise TooManyPages(chunk, element, address, f"announced are {self._budget}")
        try:
            page = self._memory.read(address, PAGE_SIZE)
        except ValueError as e:
            raise Unreadable(chunk, element, address, str(e)) from e
        if len(page) != PAGE_SIZE:
            raise Unreadable(chunk, element, address, f"{len(page)} bytes of {PAGE_SIZE}")
        self._pages[address] = page
        return page


def chunks(storage: Storage, address: int, pages: int, max_order: int) -> Iterator[Chunk]:
    """Walk the list from `address`. Each chunk is yielded with its header accepted; its elements are the caller's."""
    if not address and pages:
        raise PagesWithoutMap(pages)
    before: Chunk | None = None
    while address:
        page = storage.chunk(address, before.address if before else 0)
        order, count, following = HEADER.unpack_from(page)
        if order > max_order:
            raise OrderTooHigh(address, None, order, f"the limit is {max_order}")
        if before and order < before.order:
            raise OrdersNotAscending(address, None, order, f"after order {before.order}")
        if not 1 <= count <= CHUNK_ELEMENTS:
            raise ElementCount(address, None, count)
        if before and order == before.order and before.num_elms != CHUNK_ELEMENTS:
            raise ChunkNotFull(before.address, None, before.num_elms)
        before = Chunk(address, order, count, page)
        yield before
        address = following
