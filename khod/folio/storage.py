# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory that a map itself lies in, and the walk along its list of chunks: what both readers have in common.

Each page is read once, whole, and only while the number of pages stays within what the tree announced; so no map, whatever
is in it, costs more reads than that, nor more memory. Integers only; the restore path uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from operator import sub
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
from khod.folio.layout import BITMAP_BYTES, BITMAPS_PER_PAGE, CHUNK_ELEMENTS, HEADER
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, PhysicalMemory

_OFFSET = PAGE_SIZE - 1
_UNIT_SHIFT = BITMAP_BYTES.bit_length() - 1
_WHOLE_STEPS = [BITMAP_BYTES] * (BITMAPS_PER_PAGE - 1)
_WHOLE_PAGE = (1 << BITMAPS_PER_PAGE) - 1


class Chunk(NamedTuple):
    """A chunk whose header has been accepted."""

    address: int
    order: int
    num_elms: int
    page: bytes


class Piece(NamedTuple):
    """Bitmaps of one chunk that follow each other in one page."""

    page: int
    """Physical address."""
    offset: int
    bitmaps: int
    element: int
    """Which element of the chunk names the first."""


class Storage:
    """The pages of one map: reads, counts and claims them."""

    def __init__(self, memory: PhysicalMemory, ground: Ground, pages: int) -> None:
        self._memory = memory
        self._ground = ground
        self._budget = pages
        self._pages: dict[int, bytes] = {}
        self._chunks: set[int] = set()
        self._claimed: dict[int, int] = {}  # for each page a bit for each 512 bytes that are in use
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
        if address in self._claimed:
            raise StorageOverlap(named_by, None, address)
        self._chunks.add(address)
        self._claimed[address] = _WHOLE_PAGE
        page = self._page(address, named_by, None)
        self._digest.update(page)
        return page

    def claim(self, addresses: tuple[int, ...]) -> tuple[list[Piece], int | None]:
        """Claim the memory of one chunk's bitmaps. Their addresses in pieces, of one bitmap or several that follow each
        other in one page; and which is the first to overlap anything claimed before, None if none does.

        An address that is not aligned, or has no memory, is claimed like any other: it is for the caller to reject it, and
        to read nothing if anything is wrong.
        """
        pieces: list[Piece] = []
        steps = list(map(sub, addresses[1:], addresses))
        known = self._claimed
        at, end = 0, len(addresses)
        while at < end:
            address = addresses[at]
            offset = address & _OFFSET
            page = address - offset
            # Mostly a whole page, of which nothing was claimed before.
            if not offset and steps[at : at + BITMAPS_PER_PAGE - 1] == _WHOLE_STEPS and page not in known:
                known[page] = _WHOLE_PAGE
                pieces.append(Piece(page, 0, BITMAPS_PER_PAGE, at))
                at += BITMAPS_PER_PAGE
                continue
            # Or from here to the page's end, or to that of the list.
            count = min(BITMAPS_PER_PAGE - (offset >> _UNIT_SHIFT), end - at)
            if steps[at : at + count - 1] != _WHOLE_STEPS[: count - 1]:
                count = 1
            units = (1 << count) - 1 << (offset >> _UNIT_SHIFT)
            claimed = known.get(page, 0)
            both = claimed & units
            if both:
                return pieces, at + (both & -both).bit_length() - 1 - (offset >> _UNIT_SHIFT)
            known[page] = claimed | units
            pieces.append(Piece(page, offset, count, at))
            at += count
        return pieces, None

    def bitmaps(self, chunk: int, pieces: Sequence[Piece]) -> tuple[list[bytes], bytes]:
        """The bitmaps of the chunk whose `pieces` these are, all of which have been accepted: each piece, and all joined.

        The pieces are the pages that were read, as far as they are whole: whoever keeps them needs no more memory.
        """
        pages = self._pages
        out = []
        for page, offset, count, element in pieces:
            content = pages.get(page) or self._page(page, chunk, element)
            if count != BITMAPS_PER_PAGE:
                content = content[offset : offset + (count << _UNIT_SHIFT)]
            out.append(content)
        # Joined first: one call of the digest for a chunk instead of one for a page.
        joined = b"".join(out)
        self._digest.update(joined)
        return out, joined

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
