# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sets of folios as Python integers of 4096 bits, one per block: the restore path's own, without numpy.

Whole sets are compared bitmap by bitmap, so the cost goes with the number of bitmaps, never with that of folios.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from itertools import compress, repeat
from operator import eq, rshift, sub
from typing import NamedTuple

from khod.folio.errors import FolioUnaligned
from khod.folio.layout import BLOCK_BITS, BLOCK_SHIFT
from khod.folio.units import PAGE_SHIFT, Folio

# A window is marked in one byte per frame as long as that takes no more bytes than this per folio.
_MARKS_PER_FOLIO = 64


class Count(NamedTuple):
    """How much one order holds."""

    folios: int
    bitmaps: int
    bytes: int
    """Of memory, not of bitmaps."""


class OrderDifference(NamedTuple):
    """Folios of one order that are in one set and not in the other."""

    order: int
    folios: int
    first: tuple[Folio, ...]
    """The lowest of them, a few."""


class Blocks:
    """For each order a mapping from block index to bitmap; no bitmap is 0, no order is without a bitmap."""

    def __init__(self) -> None:
        self.orders: dict[int, dict[int, int]] = {}

    def add(self, pfns: array[int], orders: array[int]) -> None:
        """Add folios as a window of frames names them: the first frame of each (typecode 'Q'), and its order ('B').

        A folio that is there already stays: one that reaches over the end of a window is named in both. Raises
        FolioUnaligned.
        """
        for order in sorted(set(orders)):
            chosen = pfns if orders.count(order) == len(orders) else list(compress(pfns, map(eq, orders, repeat(order))))
            if order:
                frames = list(map(rshift, chosen, repeat(order)))
                for pfn, frame in zip(chosen, frames, strict=True):
                    if frame << order != pfn:
                        raise FolioUnaligned(Folio(pfn, order))
                self._add_frames(order, frames)
            else:
                self._add_frames(order, chosen)

    def _add_frames(self, order: int, frames: list[int] | array[int]) -> None:
        blocks = self.orders.setdefault(order, {})
        first, last = min(frames) >> BLOCK_SHIFT, max(frames) >> BLOCK_SHIFT
        span = last + 1 - first << BLOCK_SHIFT
        if span > _MARKS_PER_FOLIO * len(frames) + BLOCK_BITS:
            for frame in frames:
                block = frame >> BLOCK_SHIFT
                blocks[block] = blocks.get(block, 0) | 1 << (frame & BLOCK_BITS - 1)
            return
        # A digit for each frame, the highest first, makes each block a binary numeral. No bytecode runs per frame.
        top = (last + 1 << BLOCK_SHIFT) - 1
        marks = bytearray(b"0") * span
        deque(map(marks.__setitem__, map(sub, repeat(top), frames), repeat(ord("1"))), maxlen=0)
        for block in range(first, last + 1):
            at = (last - block) << BLOCK_SHIFT
            bits = int(marks[at : at + BLOCK_BITS], 2)
            if bits:
                blocks[block] = blocks.get(block, 0) | bits

    def update(self, other: Blocks) -> None:
        """Add every folio of `other`."""
        for order, theirs in other.orders.items():
            ours = self.orders.setdefault(order, {})
            for block, bits in theirs.items():
                ours[block] = ours.get(block, 0) | bits

    def contains(self, pfn: int, order: int) -> bool:
        """Whether exactly this folio is in the set."""
        frame = pfn >> order
        bits = self.orders.get(order, {}).get(frame >> BLOCK_SHIFT, 0)
        return frame << order == pfn and bool(bits >> (frame & BLOCK_BITS - 1) & 1)

    @property
    def folio_count(self) -> int:
        """How many folios there are."""
        return sum(count.folios for count in self.totals().values())

    def totals(self) -> dict[int, Count]:
        """What each order holds, ascending."""
        out = {}
        for order, blocks in sorted(self.orders.items()):
            folios = sum(map(int.bit_count, blocks.values()))
            out[order] = Count(folios, len(blocks), folios << order + PAGE_SHIFT)
        return out

    def __iter__(self) -> Iterator[Folio]:
        """Folios by order, then by frame. Costs by folio: for inspection."""
        for order, blocks in sorted(self.orders.items()):
            for block, bits in sorted(blocks.items()):
                yield from _folios(order, block, bits)

    def __eq__(self, other: object) -> bool:
        return self.orders == other.orders if isinstance(other, Blocks) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes

    def without(self, other: Blocks, examples: int = 3) -> tuple[OrderDifference, ...]:
        """What is here and not in `other`, summed up per order, with the lowest `examples` folios of each."""
        out = []
        for order, ours in sorted(self.orders.items()):
            theirs = other.orders.get(order, {})
            if ours == theirs:
                continue
            more = {block: left for block, bits in ours.items() if (left := bits & ~theirs.get(block, 0))}
            if more:
                first: list[Folio] = []
                for block in sorted(more):
                    for folio in _folios(order, block, more[block]):
                        if len(first) == examples:
                            break
                        first.append(folio)
                    if len(first) == examples:
                        break
                out.append(OrderDifference(order, sum(map(int.bit_count, more.values())), tuple(first)))
        return tuple(out)


def _folios(order: int, block: int, bits: int) -> Iterator[Folio]:
    base = block << BLOCK_SHIFT
    while bits:
        low = bits & -bits
        yield Folio(base + low.bit_length() - 1 << order, order)
        bits ^= low
