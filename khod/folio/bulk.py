# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bulk reader of the folio map, in arrays: for inspection, and for maps whose folios are wanted one by one.

It gives the verdicts of `khod.folio.walk`, down to the class of the rejection. Where that one goes through the elements and
stops at the first that is wrong, this one looks at all of them under every rule, and then picks the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from khod.folio.bitmaps import WORD, WORDS, Bitmaps, Flags, Ints, Words, frames_of
from khod.folio.errors import (
    BitmapEmpty,
    BitmapInScratch,
    BitmapNotRam,
    BitmapNull,
    BitmapUnaligned,
    ElementsNotAscending,
    FolioBeyondTop,
    FolioOverlap,
    MapRejected,
    StartBeyondTop,
    StartUnaligned,
    StorageOverlap,
)
from khod.folio.ground import Ground, Interval
from khod.folio.layout import BITMAP_BYTES, BLOCK_BITS, BLOCK_SHIFT, HEADER, TOP, block_shift
from khod.folio.overlap import meeting
from khod.folio.storage import Chunk, Storage, chunks
from khod.folio.units import DEFAULT_MAX_ORDER, PAGE_SHIFT, Folio, PhysicalMemory, Range
from khod.folio.walk import off_ground


class _Part(NamedTuple):
    """One chunk's elements. The bitmaps stay in the pages that were read, and are put together while they are looked at."""

    chunk: Chunk
    addresses: Words
    blocks: Ints
    pieces: list[bytes]
    doubtful: Ints
    """Elements whose bits are not plainly good: whose block is empty, or at the edge of anything."""

    def rows(self) -> Words:
        return np.frombuffer(b"".join(self.pieces), WORD).reshape(-1, WORDS)


class FolioArrays:
    """An accepted map."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(int(np.bitwise_count(part.rows()).sum(dtype=np.int64)) for part in self._parts)

    def __iter__(self) -> Iterator[Folio]:
        """Folios by order, then by frame."""
        for order, pfns in self.arrays():
            for pfn in pfns.tolist():
                yield Folio(pfn, order)

    def arrays(self) -> Iterator[tuple[int, Ints]]:
        """All folios as arrays of first frames, ascending; an order comes in as many pieces as it has chunks."""
        for part in self._parts:
            frames = frames_of(part.blocks, part.rows())
            order = part.chunk.order
            yield order, np.left_shift(frames, order, out=frames) if order else frames


def read_map(
    memory: PhysicalMemory,
    address: int,
    pages: int,
    sha256: bytes,
    *,
    ram: Sequence[Range],
    scratch: Sequence[Range] = (),
    max_order: int = DEFAULT_MAX_ORDER,
) -> FolioArrays:
    """Like `khod.folio.walk.validate`, with the same arguments and rejections; the folios come as arrays."""
    ground = Ground(ram, scratch)
    storage = Storage(memory, ground, pages)
    parts: list[_Part] = []
    order, last = -1, -1
    for chunk in chunks(storage, address, pages, max_order):
        fields = np.frombuffer(chunk.page, "<u8", 2 * chunk.num_elms, HEADER.size)
        starts, addresses = fields[0::2].copy(), fields[1::2].copy()
        pieces, overlapping = storage.claim(tuple(addresses.tolist()))
        _check_elements(chunk, starts, addresses, last if order == chunk.order else -1, ground, overlapping)
        order, last = chunk.order, int(starts[-1])
        blocks = (starts >> np.uint64(min(block_shift(order), 63))).astype(np.int64)
        read, joined = storage.bitmaps(chunk.address, pieces)
        parts.append(_part(chunk, addresses, blocks, read, joined, ground))
    storage.check_digest(sha256)
    for part in parts:
        _check_bits(part, ground)
    _check_overlaps(parts)
    return FolioArrays(parts)


def _check_elements(
    chunk: Chunk,
    starts: Words,
    addresses: Words,
    last: int,
    ground: Ground,
    overlaps: int | None,
) -> None:
    mask = (1 << min(block_shift(chunk.order), 64)) - 1
    if overlaps is None and _plainly_good(starts, addresses, mask, last, ground):
        return
    pages = addresses >> np.uint64(PAGE_SHIFT)
    unascended = np.zeros(len(starts), np.bool_)
    unascended[0] = int(starts[0]) <= last
    unascended[1:] = starts[1:] <= starts[:-1]
    overlapping = np.zeros(len(starts), np.bool_)
    if overlaps is not None:
        overlapping[overlaps] = True
    _reject_first(
        chunk,
        (
            (StartUnaligned, starts & np.uint64(mask) != 0, starts),
            (StartBeyondTop, starts > np.uint64(TOP), starts),
            (ElementsNotAscending, unascended, starts),
            (BitmapNull, addresses == 0, addresses),
            (BitmapUnaligned, addresses & np.uint64(BITMAP_BYTES - 1) != 0, addresses),
            (BitmapNotRam, ~_within(pages, ground.ram), addresses),
            (BitmapInScratch, _within(pages, ground.scratch), addresses),
            (StorageOverlap, overlapping, addresses),
        ),
    )


def _plainly_good(starts: Words, addresses: Words, mask: int, last: int, ground: Ground) -> bool:
    """The same rules where nothing has to be said: whether all hold, in the fewest looks. A no may be mistaken."""
    low, high = int(addresses.min()), int(addresses.max())
    return (
        last < int(starts[0])
        and int(starts[-1]) <= TOP
        and bool((starts[1:] > starts[:-1]).all())
        and not int(np.bitwise_or.reduce(starts)) & mask
        and not int(np.bitwise_or.reduce(addresses)) & BITMAP_BYTES - 1
        and low > 0
        and ground.allows(low >> PAGE_SHIFT, (high >> PAGE_SHIFT) + 1)
    )


def _within(pages: Words, intervals: Sequence[Interval]) -> Flags:
    """Which of `pages` lie in one of `intervals`, which ascend."""
    if not intervals:
        return np.zeros(len(pages), np.bool_)
    bounds = np.array(intervals, np.uint64).reshape(-1)
    # An odd number of bounds at or below a page: it is past a start, and not past its end.
    return (np.searchsorted(bounds, pages, "right") & 1).astype(np.bool_)


def _part(chunk: Chunk, addresses: Words, blocks: Ints, pieces: list[bytes], joined: bytes, ground: Ground) -> _Part:
    """Look at the bits while they are at hand. Nothing is said of them before the digest has been."""
    rows = np.frombuffer(joined, WORD).reshape(-1, WORDS)
    empty = np.bitwise_or.reduce(rows, axis=1) == 0
    inside = _all_allowed(blocks, ground.folios(chunk.order)) & (blocks < TOP >> block_shift(chunk.order))
    return _Part(chunk, addresses, blocks, pieces, np.flatnonzero(empty | ~inside))


def _check_bits(part: _Part, ground: Ground) -> None:
    # Blocks at the edge of anything are few, and looked at one by one: at the top, or on a border of the allowed ground.
    chunk, order = part.chunk, part.chunk.order
    shift = block_shift(order)
    if not len(part.doubtful):
        return
    rows = part.rows()
    for at in part.doubtful.tolist():
        block = int(part.blocks[at])
        bits = int.from_bytes(rows[at].tobytes(), "little")
        if not bits:
            raise BitmapEmpty(chunk.address, at, int(part.addresses[at]))
        room = TOP - (block << shift) >> PAGE_SHIFT + order
        beyond = bits >> room
        if beyond:
            raise FolioBeyondTop(chunk.address, at, room + (beyond & -beyond).bit_length() - 1)
        refused = bits & ground.refused(order, block)
        if refused:
            raise off_ground(ground, chunk.address, at, order, block, refused)


def _all_allowed(blocks: Ints, runs: Sequence[Interval]) -> Flags:
    """Which blocks lie wholly in one of `runs` of frames."""
    if not runs:
        return np.zeros(len(blocks), np.bool_)
    bounds = np.array(runs, np.int64)
    first = blocks << BLOCK_SHIFT
    at = np.searchsorted(bounds[:, 0], first, "right") - 1
    inside: Flags = (at >= 0) & (first + BLOCK_BITS <= bounds[at, 1])
    return inside


def _reject_first(chunk: Chunk, rules: Sequence[tuple[type[MapRejected], Flags, Words]]) -> None:
    """Raise the first rule that the first element to break any breaks."""
    broken = np.logical_or.reduce([flags for _, flags, _ in rules])
    if not broken.any():
        return
    at = int(np.argmax(broken))
    for rejection, flags, values in rules:
        if flags[at]:
            raise rejection(chunk.address, at, int(values[at]))


def _check_overlaps(parts: Sequence[_Part]) -> None:
    # From the highest order down, each against all above it. Only what lies above anything has to be in one piece.
    above: list[tuple[int, Bitmaps]] = []
    for order, group in groupby(reversed(parts), key=lambda part: part.chunk.order):
        mine = list(group)[::-1]
        for part in mine if above else ():
            held = Bitmaps(part.blocks, part.rows().reshape(-1))
            for higher, bitmaps in above:
                hit = meeting(held, bitmaps, higher - order)
                if hit is not None:
                    raise _overlap(part, held, hit << higher - order, hit + 1 << higher - order)
        if mine[0] is not parts[0]:
            blocks = np.concatenate([part.blocks for part in mine])
            above.append((order, Bitmaps(blocks, np.concatenate([part.rows().reshape(-1) for part in mine]))))


def _overlap(part: _Part, held: Bitmaps, start: int, end: int) -> FolioOverlap:
    frame = held.first(start, end)
    assert frame is not None
    order = part.chunk.order
    at = int(np.searchsorted(held.blocks, frame >> BLOCK_SHIFT))
    return FolioOverlap(part.chunk.address, at, frame << order + PAGE_SHIFT, f"order {order}")
