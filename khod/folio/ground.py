# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a preserved folio may lie: RAM, and not scratch. Integers only; the restore path uses it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from khod.folio.layout import BLOCK_BITS, BLOCK_SHIFT, TOP
from khod.folio.units import PAGE_SHIFT, Range, merged

Interval = tuple[int, int]
"""Frames from the first up to, not including, the second."""


class Ground:
    """RAM and scratch of one machine, in frames.

    A range that is not page aligned counts for RAM with its whole pages only, for scratch with every page it touches.
    """

    def __init__(self, ram: Sequence[Range], scratch: Sequence[Range] = ()) -> None:
        self.ram = _frames(ram, outwards=False)
        self.scratch = _frames(scratch, outwards=True)
        self.allowed = _without(self.ram, self.scratch)
        self._ram_starts = [start for start, _ in self.ram]
        self._folios: dict[int, list[Interval]] = {}
        self._allowed_starts = [start for start, _ in self.allowed]

    def hole(self, start: int, end: int) -> int | None:
        """The first frame of `start`..`end` that is not RAM, None if all is."""
        at = bisect_right(self._ram_starts, start) - 1
        if at < 0 or self.ram[at][1] <= start:
            return start
        ram_end = self.ram[at][1]
        return None if end <= ram_end else ram_end

    def scratch_at(self, start: int, end: int) -> Range | None:
        """A scratch region that shares a frame with `start`..`end`."""
        for low, high in self.scratch:
            if low < end and start < high:
                return Range(low << PAGE_SHIFT, high << PAGE_SHIFT)
        return None

    def allows(self, start: int, end: int) -> bool:
        """Whether all frames of `start`..`end` are RAM outside scratch."""
        at = bisect_right(self._allowed_starts, start) - 1
        return at >= 0 and end <= self.allowed[at][1]

    def refused(self, order: int, block: int) -> int:
        """The bits of a block whose folios lie, whole or in part, on ground where none may lie."""
        runs = self.folios(order)
        base = block << BLOCK_SHIFT
        allowed = 0
        for start, end in runs[max(bisect_right(runs, (base,)) - 1, 0) :]:
            low, high = max(start - base, 0), min(end - base, BLOCK_BITS)
            if low >= BLOCK_BITS:
                break
            if low < high:
                allowed |= (1 << high) - (1 << low)
        return allowed ^ (1 << BLOCK_BITS) - 1

    def folios(self, order: int) -> list[Interval]:
        """Which folios of `order` lie on allowed ground: runs of ``pfn >> order``, ascending."""
        if order not in self._folios:
            up = (1 << order) - 1
            runs = ((start + up >> order, end >> order) for start, end in self.allowed)
            self._folios[order] = [(start, end) for start, end in runs if start < end]
        return self._folios[order]


def _frames(ranges: Iterable[Range], *, outwards: bool) -> list[Interval]:
    page = (1 << PAGE_SHIFT) - 1
    up, down = (0, page) if outwards else (page, 0)
    # Merged before rounding: two ranges may share a page that neither holds alone.
    bytewise = ((max(r.start, 0), min(r.end, TOP)) for r in merged(ranges))
    whole = (Range(start + up >> PAGE_SHIFT, end + down >> PAGE_SHIFT) for start, end in bytewise)
    return [(r.start, r.end) for r in merged(whole)]


def _without(keep: Iterable[Interval], drop: Sequence[Interval]) -> list[Interval]:
    out = []
    for start, end in keep:
        for low, high in drop:
            if high <= start or end <= low:
                continue
            if start < low:
                out.append((start, low))
            start = high
            if start >= end:
                break
        if start < end:
            out.append((start, end))
    return out
