# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tracker's folios as chunks and bitmaps, ready to be written into the memory that they will be read from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from khod.folio.bitmaps import Bitmaps
from khod.folio.errors import AlreadySerialized, TooFewFrames, UnusableFrame
from khod.folio.layout import (
    BITMAP_BYTES,
    BITMAPS_PER_PAGE,
    CHUNK_ELEMENTS,
    HEADER,
    block_shift,
    chunks_for,
    pages_needed,
)
from khod.folio.tracker import Tracker
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE

__all__ = ("SerializedMap", "pages_needed", "serialize")


@dataclass(frozen=True, slots=True)
class SerializedMap:
    """A map as it is to lie in memory."""

    pages: memoryview
    """Page i belongs at file offset ``i * 4096``, that is at the physical address of ``frames[i]``."""
    address: int
    """Physical address of the first chunk, 0 for an empty map."""
    page_count: int
    """Pages that chunks and bitmaps occupy."""
    sha256: bytes
    """Over each chunk and then its bitmaps, in list order."""


def serialize(tracker: Tracker, frames: Sequence[int]) -> SerializedMap:
    """Finalize `tracker` and write its map for memory whose i-th page is the frame ``frames[i]``.

    All chunks come first, in list order, then all bitmaps, eight to a page: no page is left partly empty but the last.
    `frames` may be more than it takes. Raises AlreadySerialized, TooFewFrames, UnusableFrame; the tracker is then as before.
    """
    if tracker.finalized:
        raise AlreadySerialized
    orders = tracker.bitmaps()
    chunks = sum(chunks_for(len(held)) for _, held in orders)
    pages = chunks - -tracker.blocks() // BITMAPS_PER_PAGE
    used = _usable(tracker, frames, pages)
    content = bytearray(pages * PAGE_SIZE)
    digest = hashlib.sha256()
    page_at = np.array(used, np.uint64) << np.uint64(PAGE_SHIFT)
    chunk, bitmap = 0, chunks * PAGE_SIZE
    for order, held in orders:
        for start in range(0, len(held), CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, len(held) - start)
            following = used[chunk + 1] << PAGE_SHIFT if chunk + 1 < chunks else 0
            at = chunk * PAGE_SIZE
            HEADER.pack_into(content, at, order, count, following)
            elements = np.frombuffer(content, "<u8", 2 * count, at + HEADER.size)
            _fill(elements, content, held, slice(start, start + count), order, bitmap, page_at)
            digest.update(memoryview(content)[at : at + PAGE_SIZE])
            digest.update(memoryview(content)[bitmap : bitmap + count * BITMAP_BYTES])
            chunk += 1
            bitmap += count * BITMAP_BYTES
    tracker.finalize()
    address = used[0] << PAGE_SHIFT if used else 0
    return SerializedMap(memoryview(content).toreadonly(), address, pages, digest.digest())


def _fill(
    elements: np.ndarray[tuple[int], np.dtype[np.uint64]],
    content: bytearray,
    held: Bitmaps,
    part: slice,
    order: int,
    offset: int,
    page_at: np.ndarray[tuple[int], np.dtype[np.uint64]],
) -> None:
    """Write one chunk's elements, and its bitmaps from `offset` of the content on."""
    rows = held.rows(part)
    np.frombuffer(content, "<u8", rows.size, offset)[:] = rows.reshape(-1)
    # A block that starts at 2^64 or beyond cannot hold RAM, so block 0 is the only one of an order above 39.
    elements[0::2] = held.blocks[part].astype(np.uint64) << np.uint64(min(block_shift(order), 63))
    places = offset + np.arange(len(rows)) * BITMAP_BYTES
    elements[1::2] = page_at[places >> PAGE_SHIFT] + (places & PAGE_SIZE - 1).astype(np.uint64)


def _usable(tracker: Tracker, frames: Sequence[int], pages: int) -> list[int]:
    if len(frames) < pages:
        raise TooFewFrames(pages, len(frames))
    used = list(frames[:pages])
    seen = set()
    for pfn in used:
        if pfn in seen:
            raise UnusableFrame(pfn, "given twice")
        seen.add(pfn)
        if not tracker.ground.allows(pfn, pfn + 1):
            raise UnusableFrame(pfn, "not RAM, or scratch")
        if pfn == 0:
            raise UnusableFrame(pfn, "its address means none")
    return used
