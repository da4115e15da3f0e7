# SPDX-License-Identifier: LGPL-2.1-or-later
"""Frames with their contents: what the rest of the kernel asks for memory.

A frame that is handed out reads as zeros; one that is given back is destroyed at once, so that nobody can go on reading it
by a stale address unnoticed. Neither costs anything for frames that were never written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np

from khod.folio.units import PAGE_SHIFT
from khod.simulated.buddy import Buddy, NoMemory, Pfns
from khod.simulated.ram import Ram, data

_FEW = 1024
"""Up to so many runs are looked up one by one; beyond that the written extents of all memory are the shorter list."""
_LARGEST_MOVABLE = 9
"""Folios above this order do not come from the buddy lists of CMA (MAX_PAGE_ORDER of x86 is 10)."""


class Pages:
    """Physical memory and its allocator, together."""

    def __init__(self, ram: Ram, buddy: Buddy) -> None:
        self.ram = ram
        self.buddy = buddy

    def take(self, order: int, count: int = 1, *, movable: bool = False, scatter: int | None = None) -> Pfns:
        """First frames of `count` zeroed folios. Movable ones may lie in scratch, of which half is kept for boots.

        Raises OSError(ENOMEM), and then takes nothing.
        """
        buddy, inside = self.buddy, 0
        if movable and order <= _LARGEST_MOVABLE:
            inside = min(count, max(0, buddy.scratch_free - buddy.scratch_total // 2) >> order)
        parts: list[tuple[Pfns, bool]] = []
        try:
            if inside:
                parts.append((buddy.allocate(order, inside, scratch=True, scatter=scatter), True))
            if count > inside:
                parts.append((buddy.allocate(order, count - inside, scatter=scatter), False))
        except NoMemory as short:
            for pfns, _ in parts:
                buddy.release(pfns, order)
            raise OSError(errno.ENOMEM, str(short))
        taken = np.concatenate([pfns for pfns, _ in parts]) if parts else np.empty(0, dtype=np.int64)
        self._clear(taken, order)
        return taken

    def take_early(self, order: int) -> int:
        """One folio out of scratch, for a kernel that may not use anything else yet; its first frame."""
        taken = self.buddy.allocate(order, scratch=True)
        self._clear(taken, order)
        return int(taken[0])

    def _clear(self, pfns: Pfns, order: int) -> None:
        for _, phys, length in list(self.written(pfns, order)):
            self.ram.zero(phys, length)

    def give_back(self, pfns: Pfns, order: int) -> None:
        """Free folios and ruin what is in them; zeros in `pfns` are holes and skipped."""
        pfns = pfns[pfns != 0]
        for _, phys, length in list(self.written(pfns, order)):
            self.ram.destroy(phys, phys + length)
        self.buddy.release(pfns, order)

    def written(self, pfns: Pfns, order: int) -> Iterator[tuple[int, int, int]]:
        """What of a list of folios was ever written: (offset within the list laid end to end, address, length)."""
        spans = spans_of(pfns, order)
        spans = spans[spans[:, 1] != 0]
        if len(spans) <= _FEW:
            for offset, phys, length in spans.tolist():
                for begin, end in self.ram.data(phys, phys + length):
                    yield offset + begin - phys, begin, end - begin
            return
        spans = spans[np.argsort(spans[:, 1])]
        starts = spans[:, 1]
        for begin, end in self.ram.data(int(starts[0]), int(starts[-1] + spans[-1, 2])):
            first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)
            for offset, phys, length in spans[first : int(np.searchsorted(starts, end))].tolist():
                low, high = max(begin, phys), min(end, phys + length)
                if low < high:
                    yield offset + low - phys, low, high - low

    def read(self, pfns: Pfns, order: int, offset: int, length: int) -> bytes:
        """Bytes of a list of folios laid end to end; holes are zeros."""
        spans = spans_of(pfns, order, offset, length).tolist()
        return b"".join(self.ram.read(phys, size) if phys else bytes(size) for _, phys, size in spans)

    def write(self, pfns: Pfns, order: int, offset: int, contents: bytes | memoryview) -> None:
        """Store bytes in a list of folios laid end to end, none of which may be a hole."""
        view = memoryview(contents)
        for begin, phys, size in spans_of(pfns, order, offset, len(view)).tolist():
            self.ram.write(phys, view[begin - offset : begin - offset + size])

    def copy(self, source: Pfns, target: Pfns, order: int) -> None:
        """Copy what was written of some folios to others, new ones."""
        for offset, phys, length in self.written(source, order):
            self.write(target, order, offset, self.ram.read(phys, length))

    def load(self, fd: int, pfns: Pfns, order: int, size: int) -> None:
        """Copy the written parts of a real file into folios that have room for `size` bytes of it."""
        for begin, end in data(fd, 0, min(size, os.fstat(fd).st_size)):
            while begin < end:
                part = os.pread(fd, min(end - begin, 1 << 24), begin)
                self.write(pfns, order, begin, part)
                begin += len(part)


def spans_of(pfns: Pfns, order: int, offset: int = 0, length: int | None = None) -> Pfns:
    """Folios laid end to end as contiguous spans, in order: rows of offset, physical address (0: a hole), length."""
    shift = order + PAGE_SHIFT
    end = (len(pfns) << shift) if length is None else offset + length
    if end <= offset:
        return np.empty((0, 3), dtype=np.int64)
    first, last = offset >> shift, (end - 1) >> shift
    part = pfns[first : last + 1]
    steps, holes = np.diff(part), part[:-1] == 0
    joined = np.where(holes, steps == 0, steps == (1 << order))
    begins = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    heads = part[begins]
    starts = (begins + first) << shift
    stops = np.append(starts[1:], (last + 1) << shift)
    cut = np.maximum(starts, offset)
    phys = np.where(heads == 0, 0, (heads << PAGE_SHIFT) + cut - starts)
    return np.column_stack((cut, phys, np.minimum(stops, end) - cut))
