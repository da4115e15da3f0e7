# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bulk reader of the folio map, in arrays: for inspection, and for maps whose folios are wanted one by one.

It gives the verdicts of `khod.folio.walk`, down to the class of the rejection. Where that one goes through the elements and
stops at the first that is wrong, this one looks at all of them under every rule, and then picks the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from khod.folio.bitmaps import WORD, WORDS, Bitmaps, Flags, Ints, Words
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


class FolioArrays:
    """An accepted map."""

    def __init__(self, orders: dict[int, Bitmaps]) -> None:
        self._orders = orders

    def __len__(self) -> int:
        return sum(held.count for held in self._orders.values())

    def __iter__(self) -> Iterator[Folio]:
        """Folios by order, then by frame."""
        for order, pfns in self.arrays():
            for pfn in pfns.tolist():
                yield Folio(pfn, order)

    def arrays(self) -> Iterator[tuple[int, Ints]]:
        """All folios as arrays of first frames, ascending; an order comes in as many pieces as it takes."""
        for order, held in self._orders.items():
            for frames in held.pieces():
                yield order, np.left_shift(frames, order, out=frames)

    def bitmaps(self) -> list[tuple[int, Bitmaps]]:
        """Orders, ascending, with their bitmaps."""
        return list(self._orders.items())


class _Part:
    """One chunk's elements, accepted but for their bits."""

    def __init__(self, chunk: Chunk, blocks: Ints, addresses: Ints, rows: bytes) -> None:
        self.chunk = chunk
        self.blocks = blocks
        self.addresses = addresses
        self.rows: Words = np.frombuffer(rows, WORD).reshape(-1, WORDS)


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
        starts, addresses = fields[0::2], fields[1::2]
        _check_elements(chunk, starts, addresses, last if order == chunk.order else -1, ground, storage)
        order, last = chunk.order, int(starts[-1])
        rows = storage.bitmaps(chunk.address, addresses.tolist())
        blocks = (starts >> np.uint64(min(block_shift(order), 63))).astype(np.int64)
        parts.append(_Part(chunk, blocks, addresses.astype(np.int64), rows))
    storage.check_digest(sha256)
    for part in parts:
        _check_bits(part, ground)
    return FolioArrays(_checked_orders(parts))


def _check_elements(
    chunk: Chunk,
    starts: Words,
    addresses: Words,
    last: int,
    ground: Ground,
    storage: Storage,
) -> None:
    pages = addresses >> np.uint64(PAGE_SHIFT)
    mask = (1 << min(block_shift(chunk.order), 64)) - 1
    unascended = np.zeros(len(starts), np.bool_)
    unascended[0] = int(starts[0]) <= last
    unascended[1:] = starts[1:] <= starts[:-1]
    overlapping = np.zeros(len(starts), np.bool_)
    hit = storage.overlapping(addresses.tolist())
    if hit is not None:
        overlapping[hit] = True
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


def _within(pages: Words, intervals: Sequence[Interval]) -> Flags:
    """Which of `pages` lie in one of `intervals`, which ascend."""
    if not intervals:
        return np.zeros(len(pages), np.bool_)
    bounds = np.array(intervals, np.uint64).reshape(-1)
    # An odd number of bounds at or below a page: it is past a start, and not past its end.
    return (np.searchsorted(bounds, pages, "right") & 1).astype(np.bool_)


def _check_bits(part: _Part, ground: Ground) -> None:
    chunk, order = part.chunk, part.chunk.order
    # Room in folios from phys_start to the top; no block of an order above 40 has any.
    starts = part.blocks << min(block_shift(order), 62)
    room = np.minimum((TOP - starts) >> min(PAGE_SHIFT + order, 63), BLOCK_BITS)
    highest = _highest(part.rows)
    empty = highest < 0
    beyond = highest >= room
    off = np.zeros(len(starts), np.bool_)
    for at in np.flatnonzero(~_all_allowed(part.blocks, ground.folios(order))).tolist():
        off[at] = bool(_bits(part, at) & ground.refused(order, int(part.blocks[at])))
        if off[at]:
            break
    wrong = np.flatnonzero(empty | beyond | off)
    if not len(wrong):
        return
    at = int(wrong[0])
    if empty[at]:
        raise BitmapEmpty(chunk.address, at, int(part.addresses[at]))
    bits = _bits(part, at)
    if beyond[at]:
        over = bits >> int(room[at])
        raise FolioBeyondTop(chunk.address, at, int(room[at]) + (over & -over).bit_length() - 1)
    block = int(part.blocks[at])
    raise off_ground(ground, chunk.address, at, order, block, bits & ground.refused(order, block))


def _bits(part: _Part, at: int) -> int:
    return int.from_bytes(part.rows[at].tobytes(), "little")


def _highest(rows: Words) -> Ints:
    """The highest set bit of each row, -1 where there is none."""
    used = rows != 0
    word = WORDS - 1 - np.argmax(used[:, ::-1], axis=1)
    top = rows[np.arange(len(rows)), word]
    for shift in (1, 2, 4, 8, 16, 32):
        top |= top >> np.uint64(shift)
    bit = (word << 6) + np.bitwise_count(top).astype(np.int64) - 1
    return np.where(used.any(axis=1), bit, -1)


def _all_allowed(blocks: Ints, runs: Sequence[Interval]) -> Flags:
    """Which blocks lie wholly in one of `runs` of frames."""
    if not runs:
        return np.zeros(len(blocks), np.bool_)
    bounds = np.array(runs, np.int64)
    first = blocks << BLOCK_SHIFT
    at = np.searchsorted(bounds[:, 0], first, "right") - 1
    return np.logical_and(at >= 0, first + BLOCK_BITS <= bounds[at, 1])


def _reject_first(chunk: Chunk, rules: Sequence[tuple[type[MapRejected], Flags, Words]]) -> None:
    """Raise the first rule that the first element to break any breaks."""
    broken = np.logical_or.reduce([flags for _, flags, _ in rules])
    if not broken.any():
        return
    at = int(np.argmax(broken))
    for rejection, flags, values in rules:
        if flags[at]:
            raise rejection(chunk.address, at, int(values[at]))


def _checked_orders(parts: Sequence[_Part]) -> dict[int, Bitmaps]:
    orders: dict[int, Bitmaps] = {}
    for order in dict.fromkeys(part.chunk.order for part in parts):
        mine = [part for part in parts if part.chunk.order == order]
        rows = np.concatenate([part.rows.reshape(-1) for part in mine])
        count = int(np.bitwise_count(rows).sum(dtype=np.int64))
        orders[order] = Bitmaps(np.concatenate([part.blocks for part in mine]), rows, count)
        for lower, held in orders.items():
            if lower == order:
                continue
            above = meeting(held, orders[order], order - lower)
            if above is not None:
                raise _overlap(parts, lower, held, above << order - lower, above + 1 << order - lower)
    return orders


def _overlap(parts: Sequence[_Part], order: int, held: Bitmaps, start: int, end: int) -> FolioOverlap:
    frame = held.first(start, end)
    assert frame is not None
    for part in parts:
        at = np.flatnonzero(part.blocks == frame >> BLOCK_SHIFT)
        if part.chunk.order == order and len(at):
            return FolioOverlap(part.chunk.address, int(at[0]), frame << order + PAGE_SHIFT, f"order {order}")
    raise AssertionError("a bitmap that no element names")
