# SPDX-License-Identifier: LGPL-2.1-or-later
"""The restore path's reader of the folio map: the whole of it is validated before anything of it is used.

Standard library and integers only, because it runs inside the blackout, where importing numpy would cost more than all of
this. Its cost goes with the number of bitmaps. `khod.folio.bulk` reads the same format in arrays, and is held to the same
verdicts.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from khod.folio.blocks import Blocks, Count, OrderDifference
from khod.folio.errors import (
    BitmapEmpty,
    BitmapInScratch,
    BitmapNotRam,
    BitmapNull,
    BitmapUnaligned,
    ElementsNotAscending,
    FolioBeyondTop,
    FolioInScratch,
    FolioNotRam,
    FolioOverlap,
    MapRejected,
    StartBeyondTop,
    StartUnaligned,
    StorageOverlap,
)
from khod.folio.ground import Ground
from khod.folio.layout import BITMAP_BYTES, BLOCK_BITS, BLOCK_SHIFT, HEADER, TOP, block_shift
from khod.folio.storage import Chunk, Storage, chunks
from khod.folio.units import DEFAULT_MAX_ORDER, PAGE_SHIFT, PhysicalMemory, Range

_ALL = (1 << BLOCK_BITS) - 1


class Element(NamedTuple):
    """One bitmap, and where the map names it."""

    chunk: int
    number: int
    order: int
    block: int
    address: int
    bits: int


class FolioMap:
    """An accepted map."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    @property
    def blocks(self) -> Blocks:
        """The folios."""
        return self._blocks

    @property
    def orders(self) -> Mapping[int, Mapping[int, int]]:
        """For each order, ascending, the bitmaps by block index."""
        return self._blocks.orders

    @property
    def folio_count(self) -> int:
        """How many folios the map lists."""
        return self._blocks.folio_count

    def totals(self) -> dict[int, Count]:
        """What each order holds, ascending."""
        return self._blocks.totals()

    def contains(self, pfn: int, order: int) -> bool:
        """Whether the map lists exactly this folio."""
        return self._blocks.contains(pfn, order)

    def difference(self, other: Blocks) -> tuple[tuple[OrderDifference, ...], tuple[OrderDifference, ...]]:
        """What `other` has and the map lacks, and what the map has beyond `other`; ``((), ())`` when they are equal."""
        return other.without(self._blocks), self._blocks.without(other)


def validate(
    memory: PhysicalMemory,
    address: int,
    pages: int,
    sha256: bytes,
    *,
    ram: Sequence[Range],
    scratch: Sequence[Range] = (),
    max_order: int = DEFAULT_MAX_ORDER,
) -> FolioMap:
    """The map whose first chunk is at physical `address` (0: empty), which occupies `pages` pages and has that digest.

    Reads each page of the map once, and no more than `pages`. Raises a `khod.errors.MapError` from `khod.folio.errors`,
    and nothing else, for whatever the memory holds.
    """
    ground = Ground(ram, scratch)
    storage = Storage(memory, ground, pages)
    elements: list[Element] = []
    before = (-1, -1)
    for chunk in chunks(storage, address, pages, max_order):
        starts, addresses = _elements(chunk)
        pieces, overlapping = storage.claim(addresses)
        _check_elements(chunk, starts, addresses, before, ground, overlapping)
        before = (chunk.order, starts[-1])
        _, joined = storage.bitmaps(chunk.address, pieces)
        shift = block_shift(chunk.order)
        for i, start in enumerate(starts):
            bits = int.from_bytes(joined[i * BITMAP_BYTES : (i + 1) * BITMAP_BYTES], "little")
            elements.append(Element(chunk.address, i, chunk.order, start >> shift, addresses[i], bits))
    storage.check_digest(sha256)
    return FolioMap(_checked_blocks(elements, ground))


def _elements(chunk: Chunk) -> tuple[tuple[int, ...], tuple[int, ...]]:
    fields = struct.unpack_from(f"<{2 * chunk.num_elms}Q", chunk.page, HEADER.size)
    return fields[0::2], fields[1::2]


def _check_elements(
    chunk: Chunk,
    starts: Sequence[int],
    addresses: Sequence[int],
    before: tuple[int, int],
    ground: Ground,
    overlapping: int | None,
) -> None:
    last = before[1] if before[0] == chunk.order else -1
    unit = (1 << block_shift(chunk.order)) - 1
    good_page = -1
    for i, (start, address) in enumerate(zip(starts, addresses, strict=True)):
        if start & unit:
            raise StartUnaligned(chunk.address, i, start)
        if start > TOP:
            raise StartBeyondTop(chunk.address, i, start)
        if start <= last:
            raise ElementsNotAscending(chunk.address, i, start)
        last = start
        if not address:
            raise BitmapNull(chunk.address, i, address)
        if address % BITMAP_BYTES:
            raise BitmapUnaligned(chunk.address, i, address)
        page = address >> PAGE_SHIFT
        if page != good_page:
            if ground.hole(page, page + 1) is not None:
                raise BitmapNotRam(chunk.address, i, address)
            if not ground.allows(page, page + 1):
                raise BitmapInScratch(chunk.address, i, address)
            good_page = page
        if i == overlapping:
            raise StorageOverlap(chunk.address, i, address)


def _checked_blocks(elements: Sequence[Element], ground: Ground) -> Blocks:
    blocks = Blocks()
    for element in elements:
        bits = element.bits
        if not bits:
            raise BitmapEmpty(element.chunk, element.number, element.address)
        order, block = element.order, element.block
        # Counted, never summed: phys_start + (bit << shift) may lie beyond 2^64.
        room = TOP - (block << block_shift(order)) >> PAGE_SHIFT + order
        beyond = bits >> room
        if beyond:
            raise FolioBeyondTop(element.chunk, element.number, room + (beyond & -beyond).bit_length() - 1)
        first = block << BLOCK_SHIFT + order
        if not ground.allows(first, first + (BLOCK_BITS << order)):
            refused = bits & ground.refused(order, block)
            if refused:
                raise off_ground(ground, element.chunk, element.number, order, block, refused)
        blocks.orders.setdefault(order, {})[block] = bits
    _check_overlaps(elements, blocks)
    return blocks


def off_ground(ground: Ground, chunk: int, index: int, order: int, block: int, refused: int) -> MapRejected:
    """What is wrong with the lowest of the `refused` folios of an element."""
    pfn = (block << BLOCK_SHIFT) + (refused & -refused).bit_length() - 1 << order
    hole = ground.hole(pfn, pfn + (1 << order))
    detail = f"order {order}"
    if hole is None:
        return FolioInScratch(chunk, index, pfn << PAGE_SHIFT, detail)
    return FolioNotRam(chunk, index, pfn << PAGE_SHIFT, f"{detail}, at {hole << PAGE_SHIFT:#x}")


def _check_overlaps(elements: Sequence[Element], blocks: Blocks) -> None:
    present = sorted(blocks.orders)
    if len(present) < 2:
        return
    above = _Coverage(blocks, present)
    for element in elements:
        both = element.bits & above.of(element.order, element.block)
        if both:
            pfn = (element.block << BLOCK_SHIFT) + (both & -both).bit_length() - 1 << element.order
            raise FolioOverlap(element.chunk, element.number, pfn << PAGE_SHIFT, f"order {element.order}")


class _Coverage:
    """Which folios of a block lie inside a folio of a higher order. Each block asks the next order that there is, whose
    answer is kept: blocks that share an ancestor share its cost."""

    def __init__(self, blocks: Blocks, present: Sequence[int]) -> None:
        self._orders = blocks.orders
        self._next = dict(pairwise(present))
        self._known: dict[tuple[int, int], int] = {}

    def of(self, order: int, block: int) -> int:
        """The bits of `block` of `order`, one of the orders there are, that higher orders cover."""
        higher = self._next.get(order)
        if higher is None:
            return 0
        up = higher - order
        parent = block >> up
        # The bits of the parent that lie over this block: 4096 >> up of them, or part of one.
        taken = self._taken(higher, parent)
        if up >= BLOCK_SHIFT:
            return _ALL if taken >> (block >> up - BLOCK_SHIFT & BLOCK_BITS - 1) & 1 else 0
        width = BLOCK_BITS >> up
        part = taken >> (block & (1 << up) - 1) * width & (1 << width) - 1
        return _stretched(part, up) if part else 0

    def _taken(self, order: int, block: int) -> int:
        key = (order, block)
        if key not in self._known:
            self._known[key] = self._orders[order].get(block, 0) | self.of(order, block)
        return self._known[key]


def _stretched(bits: int, up: int) -> int:
    """Every bit ``1 << up`` times. As a numeral: binary digits read in base 4 lie two apart, hexadecimal ones are four bits
    wide; both bases are powers of two, so reading takes linear time."""
    digits = format(bits, "b")
    if up == 1:
        return int(digits, 4) * 3
    width = 1 << up - 2
    return int(digits.replace("0", "0" * width).replace("1", "f" * width), 16)
